import random

import pytest
from tokenizers_for_tests import (
    byte_level_tokenizer,
    llama_tokenizer,
    phi3_tokenizer,
    qwen_tokenizer,
)

from covft.datasets.streaming import StreamedText, answer_text

TOKENIZERS = {
    "llama": llama_tokenizer,
    "phi3": phi3_tokenizer,
    "byte-level": byte_level_tokenizer,
    "qwen": qwen_tokenizer,
}
TEXTS = [
    "the shape is blue.",
    "  no , it 's not ; do n't \n\n 1 2\n",
    "一个蓝色的圆形。",
    "yes 👍🏽 and 👨‍👩‍👧 naïve é",
    "a\n- b\n- c   d",
    " ",
    "",
]


def streamed(ids: list[int], tokenizer, **options) -> list[str]:
    text = StreamedText(tokenizer, **options)
    pieces = [text.add([i]) for i in ids]
    return [*pieces, text.finish()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_the_whole_text(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = streamed(ids, tokenizer)
    assert "".join(pieces) == answer_text(ids, tokenizer) == text.strip()
    assert not any("\ufffd" in piece for piece in pieces)
    if len(text) > 5:
        assert sum(map(bool, pieces)) > 3  # as it comes, not at the end


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_answer_cut_within_a_character_ends_before_it(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer("中🙂", add_special_tokens=False)["input_ids"]
    for missing in (1, 2, 3):
        assert "".join(streamed(ids[:-missing], tokenizer)) == "中"
        assert answer_text(ids[:-missing], tokenizer) == "中"


@pytest.mark.parametrize("kind", ["byte-level", "qwen"])
def test_bytes_that_are_no_characters(kind: str) -> None:
    tokenizer, rng = TOKENIZERS[kind](), random.Random(kind)
    broken = 0
    for _ in range(200):
        ids = [rng.randrange(len(tokenizer)) for _ in range(12)]
        whole = answer_text(ids, tokenizer)
        assert "".join(streamed(ids, tokenizer)) == whole
        broken += "\ufffd" in whole
    assert broken > 50


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["?"], "is it"),
        (["red", "it r"], "is"),
        (["it reddish"], "is it red? no"),
        ([" no", "???"], "is it red?"),
    ],
)
def test_stop_strings(kind: str, stop: list[str], expected: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    if expected == "is it":
        expected = "is it red"
    ids = tokenizer("is it red? no", add_special_tokens=False)["input_ids"]
    text = StreamedText(tokenizer, stop=stop)
    shown = ""
    for token in ids:
        shown += text.add([token])
        assert expected.startswith(shown)  # nothing that has to be taken back
    assert shown + text.finish() == expected
    assert text.stopped == (expected != "is it red? no")


@pytest.mark.parametrize("stop", ["\n", ["a", ""]])
def test_stop_must_be_texts(stop) -> None:
    with pytest.raises(ValueError, match="list of texts"):
        StreamedText(llama_tokenizer(), stop=stop)
