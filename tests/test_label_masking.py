"""Ids and labels against the rule written plainly: an answer and its terminator are supervised.

The expected ones come from the tokenizers' models (sentencepiece itself; byte-level BPE without its
special tokens), text run by text run between special tokens and images, and know nothing of the
package's rendering, offsets or special tokens.
"""

import importlib
import random
import re
from dataclasses import dataclass, field

import pytest
import sentencepiece
from tokenizers import AddedToken
from tokenizers_for_tests import (
    byte_level_tokenizer,
    llama_tokenizer,
    phi3_tokenizer,
    qwen_tokenizer,
    sentencepiece_model,
)

from covft.conversation import (
    IGNORE_INDEX,
    IMAGE_TOKEN_ID,
    Template,
    encode,
    encode_prompt,
    get_template,
)

V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)
PHI3_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
# Template, tokenizer, system prompt where it can be chosen.
CASES = {
    "v1-legacy": ("v1", lambda: llama_tokenizer(legacy=True)),
    "v1": ("v1", lambda: llama_tokenizer(legacy=False)),
    "plain-legacy": ("plain", lambda: llama_tokenizer(legacy=True)),
    "plain": ("plain", lambda: llama_tokenizer(legacy=False)),
    "plain-bytes": ("plain", byte_level_tokenizer),
    "phi3-chat-legacy": ("phi3-chat", lambda: phi3_tokenizer(legacy=True)),
    "phi3-chat": ("phi3-chat", lambda: phi3_tokenizer(legacy=False)),
    "chatml": ("chatml", byte_level_tokenizer),
    "chatml-qwen": ("chatml", qwen_tokenizer),
}
WORDS = [
    *("what", "color is", "the shape?", "blue", " ", "  ", "\n", "\n\n", "\t", "7", "42", "."),
    *(
        "图中有什么？",
        "一个蓝色的圆形",
        "。",
        "日本語",
        "한국어",
        "é",
        "naïve",
        "🙂",
        "👍🏽",
        "👨‍👩‍👧",
    ),
]
NAMES = [
    *(
        "</s>",
        "<s>",
        "<unk>",
        "<|end|>",
        "<|user|>\n",
        "<|assistant|>",
        "<|im_end|>",
        "\n<|im_end|>",
    ),
    *("<|im_start|>assistant\n", "<img>", "</img>", "<|endoftext|>", "USER:", " ASSISTANT: ", "<"),
]
Piece = tuple[str, str, bool]  # kind ("text", "special", "image"), text, supervised


@dataclass
class Expected:
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(self, ids: list[int], supervised: list[bool]) -> None:
        self.ids += ids
        self.labels += [i if s else IGNORE_INDEX for i, s in zip(ids, supervised, strict=True)]


def pieces_of(name: str, turns: list[dict], system: str) -> list[Piece]:
    """The templates as their sources define them, written out once more."""
    questions, answers = ([t["value"] for t in turns[n::2]] for n in (0, 1))
    if name == "plain":
        return [("image", "", False), ("text", answers[0] + "\n", True)]
    if name != "v1":
        questions, answers = ([text.strip() for text in texts] for texts in (questions, answers))
    if name != "phi3-chat" and sum(q.count("<image>") for q in questions) == 1:
        moved = ("<image>\n" + q.replace("<image>", "").strip() for q in questions)
        questions = [
            m.strip() if "<image>" in q else q for m, q in zip(moved, questions, strict=True)
        ]
    pieces: list[Piece] = {
        "v1": [("text", V1_SYSTEM, False)],
        "phi3-chat": [
            ("special", "<|system|>", False),
            ("text", "\n" + PHI3_SYSTEM, False),
            ("special", "<|end|>", False),
        ],
        "chatml": [
            ("special", "<|im_start|>", False),
            ("text", f"system\n{system}", False),
            ("special", "<|im_end|>", False),
            ("text", "\n", False),
        ],
    }[name]
    if name == "chatml" and not system:
        pieces = []
    for question, answer in zip(questions, answers, strict=True):
        if name == "v1":
            pieces += [("text", "USER: ", False), *asked(question), ("text", " ASSISTANT:", False)]
            pieces += [("text", " " + answer if answer else "", True), ("special", "</s>", True)]
        elif name == "phi3-chat":
            pieces += [("special", "<|user|>", False), ("text", "\n", False)]
            pieces += [*asked(question, "<img>", "</img>"), ("special", "<|end|>", False)]
            pieces += [("special", "<|assistant|>", False), ("text", "\n", False)]
            pieces += [("text", answer, True), ("special", "<|end|>", True)]
        else:
            pieces += [("special", "<|im_start|>", False), ("text", "user\n", False)]
            pieces += [*asked(question), ("special", "<|im_end|>", False), ("text", "\n", False)]
            pieces += [("special", "<|im_start|>", False), ("text", "assistant\n", False)]
            pieces += [("text", answer, True), ("special", "<|im_end|>", True)]
            pieces += [("text", "\n", False)]
    return pieces


def asked(question: str, before: str = "", after: str = "") -> list[Piece]:
    first, *others = question.split("<image>")
    pieces: list[Piece] = [("text", first, False)]
    for other in others:
        marks = [("special", mark, False) for mark in (before, after) if mark]
        pieces += [*marks[:1], ("image", "", False), *marks[1:], ("text", other, False)]
    return pieces


def expected(name: str, tokenizer, turns, system: str, num_image_tokens: list[int]) -> Expected:
    """Tokenise runs of text by the tokenizer's model, and put special tokens and images between."""
    found, counts = Expected(), iter(num_image_tokens)
    start = tokenizer("")["input_ids"]
    found.add(start, [False] * len(start))
    run: list[Piece] = []
    before = ""  # the special token before the run, "" at the start of a chunk
    for kind, text, supervised in [*pieces_of(name, turns, system), ("image", "", False)]:
        if kind == "text":
            run.append((kind, text, supervised))
            continue
        found.add(*tokenised(run, before, tokenizer))
        run, before = [], text
        if kind == "special":
            found.add([tokenizer.convert_tokens_to_ids(text)], [supervised])
        else:
            count = next(counts, 0)  # the last image stands for the end
            found.add([IMAGE_TOKEN_ID] * count, [False] * count)
    return found


def tokenised(run: list[Piece], before: str, tokenizer) -> tuple[list[int], list[bool]]:
    text = "".join(text for _, text, _ in run)
    # In each template, what is supervised is a run's end.
    supervised_from = len("".join(text for _, text, supervised in run if not supervised))
    if before.startswith("<|") and tokenizer.convert_tokens_to_ids("<|user|>"):  # Phi-3's
        swallowed = len(text) - len(text.lstrip())
        text, supervised_from = text[swallowed:], max(supervised_from - swallowed, 0)
    if not text:
        return [], []
    if "<0x0A>" in tokenizer.get_vocab():
        # Unlike sentencepiece's own, transformers' prefix is left out before a space.
        prefixed = (not before or tokenizer.legacy) and not text.startswith(" ")
        tokens = sentencepieces(text, prefixed=prefixed)
    else:
        tokens = byte_level_pieces(text, tokenizer)
    supervised_from = len(text[:supervised_from].encode())
    return [i for i, _ in tokens], [position >= supervised_from for _, position in tokens]


def sentencepieces(text: str, *, prefixed: bool) -> list[tuple[int, int]]:
    """Ids and first bytes; without a prefix by a byte in front that merges with none."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model()))
    tokens, position = [], -1 if prefixed else -2
    for piece in model.encode(text if prefixed else "\x00" + text, out_type=str):
        tokens.append((model.piece_to_id(piece), max(position, 0)))
        is_byte = re.fullmatch("<0x[0-9A-F]{2}>", piece)
        position += 1 if is_byte else len(piece.replace("▁", " ").encode())
    assert position == len(text.encode())
    return tokens if prefixed else tokens[2:]


def byte_level_pieces(text: str, tokenizer) -> list[tuple[int, int]]:
    """Ids and first bytes."""
    backend, tokens, position = tokenizer.backend_tokenizer, [], 0
    for word, _ in backend.pre_tokenizer.pre_tokenize_str(text):
        for token in backend.model.tokenize(word):
            tokens.append((token.id, position))
            position += len(token.value)  # a character stands for a byte
    assert position == len(text.encode())
    return tokens


def conversation(name: str, rng: random.Random) -> tuple[list[dict], list[int], str]:
    """Turns, the number of tokens of each image, and a system prompt."""

    def text(most: int) -> str:
        words = [rng.choice(rng.choice((WORDS, WORDS, NAMES))) for _ in range(rng.randint(0, most))]
        return rng.choice(("", " ")).join(words)

    num_turns = 1 if name == "plain" else rng.randint(1, 4)
    turns, num_images = [], 0
    for number in range(num_turns):
        question = text(6)
        tags = rng.choice((0, 0, 1, 2)) if name != "plain" else 1
        num_images += tags
        for _ in range(tags):
            place = rng.randint(0, len(question))
            while "<image>" in question[max(place - 6, 0) : place + 6]:
                place = rng.randint(0, len(question))
            question = question[:place] + "<image>" + question[place:]
        turns.append({"from": "human", "value": question if number or question else "what?"})
        turns.append({"from": "gpt", "value": text(6) if rng.random() < 0.8 else ""})
    system = text(5) if name == "chatml" and rng.random() < 0.5 else ""
    for special in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        system = system.replace(special, "")  # a template's own text may hold them
    return turns, [rng.randint(1, 3) for _ in range(num_images)], system


def answers_in(encoded, template: Template, tokenizer) -> list[str]:
    """Decode the supervised tokens, cut behind each terminator."""
    end = template.stop_token_ids(tokenizer)[0]
    answers, ids = [], []
    labels = encoded.labels[encoded.labels != IGNORE_INDEX].tolist()
    if template.name == "plain":  # its terminator, a line break, may be in the caption
        assert labels[-1] == end
        return [tokenizer.decode(labels[:-1])]
    for label in labels:
        ids.append(label)
        if label == end:
            answers.append(tokenizer.decode(ids[:-1]))
            ids = []
    assert not ids
    return answers


@pytest.mark.parametrize("case", CASES)
def test_random_conversations_follow_the_rule(case: str) -> None:
    name, make = CASES[case]
    tokenizer, rng = make(), random.Random(case)
    with_names = 0
    for _ in range(60):
        turns, num_image_tokens, system = conversation(name, rng)
        template = get_template({"type": name, "system": system} if name == "chatml" else name)
        encoded = encode(
            turns, template=template, tokenizer=tokenizer, num_image_tokens=num_image_tokens
        )
        rule = expected(name, tokenizer, turns, system, num_image_tokens)
        assert encoded.input_ids.tolist() == rule.ids, turns
        assert encoded.labels.tolist() == rule.labels, turns
        prompt = encode_prompt(
            turns[:-1], template=template, tokenizer=tokenizer, num_image_tokens=num_image_tokens
        )
        assert rule.ids[: len(prompt)] == prompt.tolist()

        texts = [turn["value"] for turn in turns[1::2]]
        texts = [text.strip() if template.strip else text for text in texts]
        if case in ("plain", "plain-legacy"):  # the space in the prefix's place
            texts = [text.removeprefix(" ") for text in texts]
        assert answers_in(encoded, template, tokenizer) == texts, turns
        with_names += any(token in text for text in texts for token in tokenizer.all_special_tokens)
    assert with_names >= 5


@pytest.mark.parametrize("case", ["v1-legacy", "v1", "phi3-chat", "chatml"])
def test_a_users_text_cannot_end_his_turn(case: str) -> None:
    name, make = CASES[case]
    tokenizer, template = make(), get_template(name)
    end = template.end_of_answer(tokenizer)
    turns = [
        {"from": "human", "value": f"is {end} a tag?"},
        {"from": "gpt", "value": f"{end} ends a turn"},
    ]
    encoded = encode(turns, template=template, tokenizer=tokenizer)
    plain = encode(
        [{**turn, "value": turn["value"].replace(end, "x")} for turn in turns],
        template=template,
        tokenizer=tokenizer,
    )
    stop = template.stop_token_ids(tokenizer)[0]
    count = int((plain.input_ids == stop).sum())
    assert count and int((encoded.input_ids == stop).sum()) == count
    assert int((encoded.labels == stop).sum()) == 1
    assert f"is {end} a tag?" in tokenizer.decode(encoded.input_ids)


def test_texts_without_names_are_tokenised_by_the_tokenizer_itself(monkeypatch) -> None:
    module = importlib.import_module("covft.conversation.encode")  # not the function
    monkeypatch.setattr(module, "literal_tokenizer", None)
    arguments = {"template": get_template("chatml"), "tokenizer": qwen_tokenizer()}
    turns = [{"from": "human", "value": "<im_end> | what?"}, {"from": "gpt", "value": "blue"}]
    assert encode(turns, **arguments).num_truncated == 0
    turns[0]["value"] = "<|im_end|>"
    with pytest.raises(TypeError):
        encode(turns, **arguments)


def test_markup_that_the_tokenizer_does_not_call_special() -> None:
    tokenizer = phi3_tokenizer.__wrapped__()
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<end>", "<tool>", "    ")])
    template = Template(name="own", before_question="Q", after_question=":", terminator="<end>")
    turns = [{"from": "human", "value": "a<end>b<tool>c    d"}, {"from": "gpt", "value": "e<end>f"}]
    encoded = encode(turns, template=template, tokenizer=tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist())
    # Added tokens that the template doesn't write are words, as before.
    assert tokens.count("<end>") == 1 and tokens[-1] == "<end>"
    assert tokens.count("<tool>") == tokens.count("    ") == 1
    assert answers_in(encoded, template, tokenizer) == ["e<end>f"]


def test_a_reserved_character_beside_a_name_is_refused() -> None:
    arguments = {"template": get_template("v1"), "tokenizer": llama_tokenizer()}
    turns = [{"from": "human", "value": "a\ufdd00\ufdd1 </s>"}, {"from": "gpt", "value": "b"}]
    with pytest.raises(ValueError, match=r"U\+FDD0"):
        encode(turns, **arguments)
    turns[0]["value"] = "a\ufdd00\ufdd1"
    assert encode(turns, **arguments).num_truncated == 0
