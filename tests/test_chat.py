import pytest
from PIL import Image

from covft.chat import ChatSession
from covft.checkpoints import build_model
from covft.config import load_config, stage_configs
from covft.conversation import IMAGE_TOKEN_ID
from covft.datasets import InputSpec
from covft.datasets.prompts import Prompt, collate_prompts, generate_answers


@pytest.fixture
def session(tiny_options) -> ChatSession:
    model = build_model(stage_configs(load_config("quickstart_covft", tiny_options))[-1][1]).eval()
    return ChatSession(model, InputSpec.of(model), [Image.new("RGB", (20, 20), "red")])


def test_follow_up_sees_the_conversation_but_the_first_context(session: ChatSession) -> None:
    prompts, contexts = [], []
    session.model.llm.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: (
            prompts.append(kwargs["inputs_embeds"].shape[1])
            if kwargs.get("inputs_embeds") is not None
            else None
        ),
        with_kwargs=True,
    )
    session.model.text_encoder.register_forward_hook(lambda _m, a, _o: contexts.append(a[0]))
    session.ask("what color is the shape?", max_new_tokens=3)
    session.ask("is there a circle?", max_new_tokens=3)
    assert [turn["from"] for turn in session.turns] == ["human", "gpt", "human", "gpt"]
    assert session.turns[0]["value"].count("<image>") == 1
    assert "<image>" not in session.turns[2]["value"]
    assert len(prompts) == 2 and prompts[1] > prompts[0]
    assert contexts[0].tolist() == contexts[1].tolist()


def test_further_questions_do_not_encode_the_images_again(session: ChatSession) -> None:
    blocks, passes = session.model.vision.backbone.blocks, []
    for index in (0, len(blocks) - 1):
        blocks[index].register_forward_hook(lambda *_, index=index: passes.append(index))
    first = session.ask("what color is the shape?", max_new_tokens=3)
    second = session.ask("is there a circle?", max_new_tokens=3)
    assert passes == [0, len(blocks) - 1, len(blocks) - 1]

    context = session.turns[0]["value"].replace("<image>", "").strip()
    for last, answer in ((1, first), (3, second)):
        prompt = Prompt("uncached", session.turns[:last], session.images, context)
        expected = generate_answers(session.model, [prompt], session.spec, max_new_tokens=3)
        assert expected == [answer]


def test_empty_question(session: ChatSession) -> None:
    with pytest.raises(ValueError, match="the question is empty"):
        session.ask("  ")


def test_image_placeholders_match_the_model(session: ChatSession) -> None:
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}]
    batch = collate_prompts([Prompt("x", turns, session.images)], session.spec)
    assert int((batch["input_ids"] == IMAGE_TOKEN_ID).sum()) == session.model.num_image_tokens
