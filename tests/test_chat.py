import importlib.util
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from covft.chat import ChatSession
from covft.checkpoints import build_model
from covft.config import load_config, stage_configs
from covft.conversation import IMAGE_TOKEN_ID, context_text
from covft.datasets import InputSpec
from covft.datasets.prompts import Prompt, collate_prompts, generate_answers
from covft.models.mllm import MLLM
from covft.models.sampling import Sampling

IMAGES = [Image.new("RGB", (20, 20), color) for color in ("red", "blue", "green")]


def build(options: dict, method: str = "covft") -> MLLM:
    stage = stage_configs(load_config(f"quickstart_{method}", options))[-1][1]
    model = build_model(stage).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # answers that depend on image and context
        for name, parameter in model.named_parameters():
            if not name.startswith("llm"):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter) * 0.3)
    return model


@pytest.fixture
def model(tiny_options) -> MLLM:
    return build(tiny_options)


@pytest.fixture
def session(model: MLLM) -> ChatSession:
    return ChatSession(model, InputSpec.of(model), IMAGES[:1])


def answered_alone(session: ChatSession, turns: list[dict], context: str, count: int) -> str:
    """What the model answers to the same prompt without anything kept from before."""
    images = session.images[: sum(turn["value"].count("<image>") for turn in turns)]
    prompt = Prompt("uncached", turns, images, context)
    return generate_answers(session.model, [prompt], session.spec, max_new_tokens=count)[0]


def contexts_read(model: MLLM) -> list[torch.Tensor]:
    read: list[torch.Tensor] = []
    model.text_encoder.register_forward_hook(lambda _m, a, _o: read.append(a[0]))
    return read


def test_follow_up_sees_the_conversation_but_the_first_context(session: ChatSession) -> None:
    prompts, contexts = [], contexts_read(session.model)
    session.model.llm.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: (
            prompts.append(kwargs["inputs_embeds"].shape[1])
            if kwargs.get("inputs_embeds") is not None
            else None
        ),
        with_kwargs=True,
    )
    session.ask("what color is the shape?", max_new_tokens=3)
    session.ask("is there a circle?", max_new_tokens=3)
    assert [turn["from"] for turn in session.turns] == ["human", "gpt", "human", "gpt"]
    assert session.turns[0]["value"].count("<image>") == 1
    assert "<image>" not in session.turns[2]["value"]
    assert len(prompts) == 2 and prompts[1] > prompts[0]
    expected = session.spec.context_tokenizer("what color is the shape?")["input_ids"]
    assert [ids.tolist() for ids in contexts] == [[expected]]


def test_a_pinned_session_encodes_each_image_once(session: ChatSession) -> None:
    blocks, images = session.model.vision.backbone.blocks, []
    for index in (0, len(blocks) - 1):
        blocks[index].register_forward_hook(lambda _m, a, _o: images.append(len(a[0])))
    session.ask("what color is the shape?", max_new_tokens=3)
    session.ask("is there a circle?", max_new_tokens=3)
    assert images == [1, 1]
    session.ask("and in these?", images=IMAGES[1:], max_new_tokens=3)
    assert images == [1, 1, 2, 2]
    assert [turn["value"].count("<image>") for turn in session.turns] == [1, 0, 0, 0, 2, 0]

    context = "what color is the shape?"
    for last in (1, 3, 5):
        turns = session.turns[:last]
        expected = answered_alone(session, turns, context, 3)
        assert session.turns[last]["value"] == expected


def test_a_refreshed_session_reads_each_question(model: MLLM) -> None:
    session = ChatSession(model, InputSpec.of(model), IMAGES[:2], context="refreshed")
    passes = []
    for index in (0, len(model.vision.backbone.blocks) - 1):
        model.vision.backbone.blocks[index].register_forward_hook(
            lambda *_, index=index: passes.append(index)
        )
    for question in ("what color is the shape?", "is there a circle?"):
        session.ask(question, max_new_tokens=4)
    assert passes == [0, 2, 2]  # what doesn't read the context is kept
    for last, question in ((1, "what color is the shape?"), (3, "is there a circle?")):
        expected = answered_alone(session, session.turns[:last], question, 4)
        assert session.turns[last]["value"] == expected


def test_pinned_and_refreshed_tokens_differ(model: MLLM) -> None:
    tokens = []
    model.projector.register_forward_hook(lambda _m, _a, output: tokens.append(output))
    for context in ("pinned", "refreshed"):
        session = ChatSession(model, InputSpec.of(model), IMAGES[:1], context=context)
        session.ask("what color is the shape?", max_new_tokens=1)
        session.ask("is there a circle?", max_new_tokens=1)
    first, again, refreshed = tokens
    torch.testing.assert_close(again, first)
    assert (refreshed - first).abs().max() > 1e-3


@pytest.mark.parametrize("first", ["", "hello"])
def test_the_pin_is_the_first_question_with_images(model: MLLM, first: str) -> None:
    session, contexts = ChatSession(model, InputSpec.of(model)), contexts_read(model)
    if first:
        session.ask(first, max_new_tokens=2)
        contexts.clear()
    session.ask("is there a circle?", images=IMAGES[:1], max_new_tokens=2)
    session.ask("and here?", images=IMAGES[1:2], max_new_tokens=2)
    expected = session.spec.context_tokenizer("is there a circle?")["input_ids"]
    assert [ids.tolist() for ids in contexts] == [[expected]] * 2


def test_pieces_of_a_stream_make_the_answer(session: ChatSession, model: MLLM) -> None:
    other = ChatSession(model, session.spec, IMAGES[:1])
    for question in ("what color is the shape?", "图中有什么？", "is </s> or <|im_end|> a tag?"):
        pieces = list(session.stream(question, max_new_tokens=24))
        answer = other.ask(question, max_new_tokens=24)
        assert "".join(pieces) == answer == session.turns[-1]["value"]
        context = context_text(session.turns[:1])
        assert answer == answered_alone(session, session.turns[:-1], context, 24)
    assert len(pieces) > 3
    assert session.turns == other.turns


def test_an_answer_that_is_left_is_forgotten(session: ChatSession) -> None:
    threads = threading.active_count()
    stream = session.stream("what color is the shape?", images=IMAGES[1:2], max_new_tokens=400)
    next(stream)
    stream.close()
    assert threading.active_count() == threads
    assert session.turns == [] and session.images == IMAGES[:1]
    # Neither is its question the context of what comes.
    answer = session.ask("is there a circle?", max_new_tokens=6)
    assert answer == answered_alone(session, session.turns[:1], "is there a circle?", 6)


def test_an_answer_overtaken_by_another_is_refused(session: ChatSession) -> None:
    stream = session.stream("what color is the shape?", max_new_tokens=30)
    next(stream)
    session.ask("is there a circle?", max_new_tokens=2)
    with pytest.raises(ValueError, match="asked or reset"):
        list(stream)
    assert len(session.turns) == 2


def test_what_generation_raises_is_raised(session: ChatSession, monkeypatch) -> None:
    def fail(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(session.model.llm.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        session.ask("what color is the shape?")
    assert session.turns == []


def test_stop_strings_end_the_answer(session: ChatSession) -> None:
    whole = session.ask("what color is the shape?", max_new_tokens=24)
    session.reset()
    session.add_images(IMAGES[:1])
    stop = whole[len(whole) // 2 :][:2]
    steps = []
    session.model.llm.model.register_forward_pre_hook(lambda *_: steps.append(1))
    answer = session.ask("what color is the shape?", max_new_tokens=400, stop=[stop])
    assert answer == whole[: whole.index(stop)].rstrip()
    assert len(steps) < 100


def test_reset_and_seed(model: MLLM) -> None:
    def talk(session: ChatSession) -> list[str]:
        session.add_images(IMAGES[:1])
        return [session.ask(q, max_new_tokens=8) for q in ("what is it?", "is it red?")]

    def session(seed: int | None) -> ChatSession:
        sampling = Sampling(temperature=3.0, top_p=0.95, seed=seed)
        return ChatSession(model, InputSpec.of(model), sampling=sampling)

    first = session(1)
    answers = talk(first)
    assert answers == talk(session(1)) != talk(session(2))
    first.reset()
    assert first.turns == [] and first.images == []
    assert talk(first) == answers


def test_a_question_that_cannot_be_asked(session: ChatSession, tmp_path: Path) -> None:
    for question in ("  ", "what is <image>?"):
        with pytest.raises(ValueError, match="the question is empty"):
            session.ask(question)
    with pytest.raises(ValueError, match=r"image not found: .*none\.png"):
        session.ask("what?", images=[tmp_path / "none.png"])
    with pytest.raises(ValueError, match="must be a list"):
        session.ask("what?", images="none.png")
    with pytest.raises(ValueError, match="list of texts"):
        session.stream("what?", stop="\n")
    with pytest.raises(ValueError, match="max_new_tokens must be positive"):
        session.ask("what?", max_new_tokens=0)
    assert session.turns == [] and len(session.images) == 1


def test_a_full_context_window_is_explained(session: ChatSession) -> None:
    positions = session.model.llm.model.config.max_position_embeddings
    with pytest.raises(ValueError, match=rf"max_new_tokens={positions} .* {positions} positions"):
        session.ask("what?", max_new_tokens=positions)
    session.ask("what?", max_new_tokens=2)
    assert len(session.turns) == 2


def test_options_that_would_be_ignored(tiny_options, model: MLLM) -> None:
    frozen = build(tiny_options, "freeze")
    with pytest.raises(ValueError, match="Freeze reads no context"):
        ChatSession(frozen, InputSpec.of(frozen), context="refreshed")
    with pytest.raises(ValueError, match="'pinned' or 'refreshed'"):
        ChatSession(model, InputSpec.of(model), context="fresh")
    with pytest.raises(ValueError, match=r"model\.eval"):
        ChatSession(model.train(), InputSpec.of(model))


def test_image_placeholders_match_the_model(session: ChatSession) -> None:
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}]
    batch = collate_prompts([Prompt("x", turns, session.images)], session.spec)
    assert int((batch["input_ids"] == IMAGE_TOKEN_ID).sum()) == session.model.num_image_tokens


@pytest.fixture
def tool(model: MLLM, monkeypatch, tmp_path: Path):
    """The command line tool; ``run(arguments, typed)`` runs it on the model."""
    path = Path(__file__).parents[1] / "tools" / "chat.py"
    module_spec = importlib.util.spec_from_file_location("chat_tool", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    run = SimpleNamespace(model=model, spec=InputSpec.of(model), resize=None)
    monkeypatch.setattr("covft.checkpoints.load_run", lambda *_, **__: run)
    IMAGES[0].save(tmp_path / "red one.png")

    def main(arguments: list[str], typed: list = ()) -> None:
        lines = iter(typed)

        def read(_prompt: str) -> str:
            line = next(lines)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr("sys.argv", ["chat.py", str(tmp_path), *arguments])
        module.main()

    return main


def test_tool_answers_and_exits(tool, model: MLLM, tmp_path: Path, capsys) -> None:
    image = str(tmp_path / "red one.png")
    tool(["--image", image, "what is it?", "is it red?", "--max-new-tokens", "4"])
    session = ChatSession(model, InputSpec.of(model), [image])
    expected = [[f"> {q}", session.ask(q, max_new_tokens=4)] for q in ("what is it?", "is it red?")]
    assert capsys.readouterr().out == "".join(f"{q}\n{a}\n" for q, a in expected)


def test_tool_converses(tool, model: MLLM, tmp_path: Path, capsys, monkeypatch) -> None:
    image = str(tmp_path / "red one.png")
    asked = []
    stream = ChatSession.stream

    def interrupted(self, question: str, **options):
        asked.append((question, len(self.turns), len(self.images)))
        if question == "stop":
            raise KeyboardInterrupt
        return stream(self, question, **options)

    monkeypatch.setattr(ChatSession, "stream", interrupted)
    typed = [
        *("what is it?", f"/image {image}", "/image none.png", "and this?", "stop", "<image>"),
        *(KeyboardInterrupt(), "still there?", "/nonsense", "/reset", "again?", "/quit", "never"),
    ]
    tool(["--max-new-tokens", "3", "--temperature", "0.5", "--seed", "1"], typed)
    assert asked == [
        *(("what is it?", 0, 0), ("and this?", 2, 1), ("stop", 4, 1), ("<image>", 4, 1)),
        *(("still there?", 4, 1), ("again?", 0, 0)),
    ]
    out = capsys.readouterr().out
    assert out.count("the question is forgotten") == 2
    assert "error: image not found: none.png" in out and "error: the question is empty" in out
    assert "'/nonsense' is unknown" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "none.png", "what?"], "image not found: none.png"),
        (["--temperature", "-1", "what?"], "temperature must be positive"),
    ],
)
def test_tool_explains_mistakes(tool, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tool(arguments)


def test_tool_refuses_what_it_would_ignore(tool, capsys) -> None:
    with pytest.raises(SystemExit):
        tool(["--seed", "1", "what?"])
    assert "would be ignored without --temperature" in capsys.readouterr().err
