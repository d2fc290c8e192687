import copy
import dataclasses

import pytest
import torch
from tokenizers_for_tests import llama_tokenizer

from covft.conversation import IGNORE_INDEX, get_template
from covft.datasets import BadSample, Collator, InputSpec, InstructDataset


@pytest.fixture
def samples(spec, image_root, record):
    records = [
        record("one", image="a.png"),
        record("text", texts=("is there a red circle in the image?", "no")),
        record("bad", image="none.png"),
        record("two", image=["b.png", "c.jpg"], texts=("same?", "no")),
    ]
    dataset = InstructDataset(records, spec=spec, image_root=str(image_root))
    return [dataset[i] for i in range(4)]


def test_a_batch(spec, samples):
    batch = Collator(spec)(samples)
    good = [samples[0], samples[1], samples[3]]
    longest = max(len(s.input_ids) for s in good)
    assert batch["input_ids"].shape == batch["labels"].shape == (3, longest)
    assert batch["attention_mask"].dtype == torch.bool
    for row, sample in enumerate(good):
        length = len(sample.input_ids)
        assert batch["input_ids"][row, :length].equal(sample.input_ids)
        assert (batch["input_ids"][row, length:] == spec.tokenizer.pad_token_id).all()
        assert batch["labels"][row, :length].equal(sample.labels)
        assert (batch["labels"][row, length:] == IGNORE_INDEX).all()
        assert batch["attention_mask"][row].tolist() == [n < length for n in range(longest)]
    assert batch["pixel_values"].dtype == torch.uint8
    expected = torch.cat([good[0].pixel_values, good[2].pixel_values])
    assert batch["pixel_values"].equal(expected)
    assert batch["image_to_sample"].tolist() == [0, 2, 2]
    assert batch["image_to_sample"].dtype == torch.long
    assert batch["sample_ids"] == ["one", "text", "two"]
    assert [(bad.id, "not found" in bad.reason) for bad in batch["bad_samples"]] == [("bad", True)]


def test_context_is_tokenised_and_truncated(spec, samples):
    tokenizer = spec.context_tokenizer
    batch = Collator(spec)(samples)
    for row, text in enumerate(("what color is it?", "is there a red circle in the image?")):
        ids = batch["context_ids"][row][batch["context_mask"][row]]
        assert ids.tolist() == tokenizer(text)["input_ids"]
    assert batch["context_mask"].dtype == torch.bool
    assert not batch["context_mask"].all()
    short = Collator(dataclasses.replace(spec, max_context_length=5))(samples)
    assert short["context_ids"].shape == (3, 5)
    assert short["context_ids"][0, -1] == tokenizer.sep_token_id


def test_no_context_without_its_tokenizer(spec, samples):
    batch = Collator(dataclasses.replace(spec, context_tokenizer=None))(samples)
    assert not {"context_ids", "context_mask"} & set(batch)


def test_text_alone(spec, samples):
    batch = Collator(spec)([samples[1]])
    assert batch["pixel_values"].shape == (0, 3, 8, 8)
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["image_to_sample"].shape == (0,)
    assert batch["attention_mask"].all()


def test_a_batch_without_any_good_sample(spec):
    batch = Collator(spec)([BadSample("x", "gone"), BadSample("y", "gone")])
    for name in ("input_ids", "labels", "attention_mask", "context_ids", "context_mask"):
        assert len(batch[name]) == 0
        assert batch[name].ndim == 2
    assert batch["input_ids"].dtype == torch.long
    assert batch["pixel_values"].shape == (0, 3, 8, 8)
    assert batch["sample_ids"] == []
    assert [bad.id for bad in batch["bad_samples"]] == ["x", "y"]
    assert (batch["labels"][:, 1:] != IGNORE_INDEX).sum() == 0


def test_tokenizers_without_padding_pad_with_zero(spec, record):
    llama = dataclasses.replace(spec, tokenizer=llama_tokenizer(), template=get_template("v1"))
    dataset = InstructDataset([record("a"), record("b", texts=("a b c?", "no no"))], spec=llama)
    batch = Collator(llama)([dataset[0], dataset[1]])
    assert not batch["attention_mask"].all()
    assert (batch["input_ids"][~batch["attention_mask"]] == 0).all()


def test_a_spec_checks_itself(spec):
    with pytest.raises(ValueError, match="num_image_tokens must be positive, got 0"):
        dataclasses.replace(spec, num_image_tokens=0)
    with pytest.raises(ValueError, match="no single token"):
        InputSpec(spec.tokenizer, get_template("v1"), spec.image, 4)


def test_context_is_padded_on_the_right_whatever_its_tokenizer_does(spec, samples):
    tokenizer = copy.deepcopy(llama_tokenizer())  # it's shared between tests
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    batch = Collator(dataclasses.replace(spec, context_tokenizer=tokenizer))(samples)
    lengths = batch["context_mask"].sum(1)
    assert lengths.min() < lengths.max()
    for row, length in enumerate(lengths):
        assert batch["context_mask"][row].tolist() == [
            n < length for n in range(batch["context_mask"].shape[1])
        ]
