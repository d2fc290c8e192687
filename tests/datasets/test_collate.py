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


@pytest.mark.parametrize("pack", [False, True])
def test_a_batch_without_any_good_sample_is_one_token(spec, pack):
    batch = Collator(spec, pack=pack)([BadSample("x", "gone"), BadSample("y", "gone")])
    assert batch["input_ids"].tolist() == [[spec.tokenizer.pad_token_id]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX]]
    if pack:
        assert batch["position_ids"].tolist() == [[0]]
        assert batch["cu_seqlens"].tolist() == [0, 1]
    else:
        assert batch["attention_mask"].tolist() == [[True]]
    assert batch["context_ids"].shape == batch["context_mask"].shape == (1, 1)
    assert batch["context_mask"].all()
    assert batch["input_ids"].dtype == batch["context_ids"].dtype == torch.long
    assert batch["pixel_values"].shape == (0, 3, 8, 8)
    assert batch["image_to_sample"].shape == (0,)
    assert batch["sample_ids"] == []
    assert [bad.id for bad in batch["bad_samples"]] == ["x", "y"]


def test_a_packed_batch(spec, samples):
    padded, packed = Collator(spec)(samples), Collator(spec, pack=True)(samples)
    good = [samples[0], samples[1], samples[3]]
    lengths = [len(sample.input_ids) for sample in good]
    assert packed["cu_seqlens"].tolist() == [0, lengths[0], sum(lengths[:2]), sum(lengths)]
    assert packed["cu_seqlens"].dtype == torch.int32
    assert "attention_mask" not in packed
    rows = {name: packed[name][0].split(lengths) for name in ("input_ids", "labels")}
    positions = packed["position_ids"][0].split(lengths)
    for index, sample in enumerate(good):
        assert rows["input_ids"][index].equal(sample.input_ids)
        assert rows["labels"][index][0] == IGNORE_INDEX
        assert rows["labels"][index][1:].equal(sample.labels[1:])
        assert positions[index].tolist() == list(range(lengths[index]))
    same = {"pixel_values", "image_to_sample", "context_ids", "context_mask"}
    assert all(packed[name].equal(padded[name]) for name in same)
    assert packed["sample_ids"] == padded["sample_ids"]
    assert packed["bad_samples"] == padded["bad_samples"]
    assert packed.keys() - padded.keys() == {"position_ids", "cu_seqlens"}
    assert packed.keys() >= same


def test_packing_ignores_first_labels_and_leaves_the_samples_alone(spec, samples):
    learnt = [dataclasses.replace(samples[i], labels=samples[i].input_ids.clone()) for i in (1, 3)]
    for several in (learnt, learnt[:1]):
        labels = Collator(spec, pack=True)(several)["labels"][0]
        firsts = [0, len(learnt[0].labels)][: len(several)]
        assert (labels == IGNORE_INDEX).nonzero().flatten().tolist() == firsts
    assert all((sample.labels != IGNORE_INDEX).all() for sample in learnt)


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
