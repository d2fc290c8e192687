import json
import os
import pickle
import time

import pytest
import torch
from torch.utils.data import DataLoader

from covft.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID
from covft.datasets import BadSample, Collator, InstructDataset, Sample, transform
from covft.images import load_image


def test_a_sample(spec, image_root, record):
    texts = ("<image>\nwhat color?", "blue", "sure?", "yes")
    dataset = InstructDataset(
        [record("x", image="a.png", texts=texts)], spec=spec, image_root=str(image_root)
    )
    sample = dataset[0]
    assert sample.id == "x"
    assert int((sample.input_ids == IMAGE_TOKEN_ID).sum()) == spec.num_image_tokens
    expected = transform(load_image(image_root / "a.png"), spec.image)
    assert torch.equal(sample.pixel_values, expected[None])
    assert sample.context_text == "what color? sure?"
    supervised = spec.tokenizer.decode(sample.input_ids[sample.labels != IGNORE_INDEX])
    assert supervised == " blue<|im_end|> yes<|im_end|>"
    assert sample.num_truncated == 0


def test_files_and_records_together(spec, tmp_path, record):
    (tmp_path / "one.json").write_text(json.dumps([record("a"), record("b")]))
    # A line separator within a text isn't the end of a line.
    lines = [record("c", texts=("what\u2028color?", "blue")), record("d")]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "two.jsonl").write_text(text + "\n\n", encoding="utf-8")
    paths = [str(tmp_path / "one.json"), str(tmp_path / "two.jsonl")]
    dataset = InstructDataset([*paths, record("e")], spec=spec)
    assert [dataset[i].id for i in range(len(dataset))] == ["a", "b", "c", "d", "e"]
    assert len(InstructDataset(paths[0], spec=spec)) == 2


def test_annotation_files_that_cannot_be_read(spec, tmp_path, record):
    (tmp_path / "broken.jsonl").write_text(json.dumps(record("a")) + "\n{")
    with pytest.raises(ValueError, match=r"broken.jsonl, line 2 is no valid JSON"):
        InstructDataset(str(tmp_path / "broken.jsonl"), spec=spec)
    (tmp_path / "object.json").write_text(json.dumps(record("a")))
    with pytest.raises(ValueError, match="no list of records"):
        InstructDataset(str(tmp_path / "object.json"), spec=spec)
    with pytest.raises(ValueError, match=r"not found: .*none.json"):
        InstructDataset(str(tmp_path / "none.json"), spec=spec)
    (tmp_path / "list.json").write_text("[3]")
    with pytest.raises(ValueError, match="annotation 0 is a int"):
        InstructDataset(str(tmp_path / "list.json"), spec=spec)


def planted(record):
    """Good annotations, and bad ones with what is wrong with them."""
    good = [
        record("good image", image="a.png"),
        record("good text"),
        record("good jpg", image="c.jpg", texts=("<image>what?", "blue")),
        record("good pair", image=["a.png", "b.png"], texts=("<image> and <image>?", "no")),
        record("good empty list", image=[]),
        record("good null") | {"image": None},
        record("good empty answer", texts=("what?", "", "and?", "red")),
        record(17, texts=("你好？", "你好 🙂")),
    ]
    bad = {
        "no turns": (record("no turns", texts=()), "no question"),
        "unanswered": (record("unanswered", texts=("what?",)), "expected an answer"),
        "tags": (record("tags", texts=("<image>?", "no")), "1 <image> tags but 0 images"),
        "roles": (
            {"id": "roles", "conversations": [{"from": "system", "value": "x"}]},
            "expected 'human' or 'gpt'",
        ),
        "missing": ({"id": "missing"}, "'conversations' is missing"),
        "image": (record("image", image=3), "'image' must be a path"),
    }
    bad_at_loading = {
        "not there": (record("not there", image="none.png"), "image not found"),
        "truncated": (record("truncated", image="broken.jpg"), "can't be read"),
        "second": (record("second", image=["a.png", "none.png"]), "image not found"),
        "long": (record("long", texts=("what? " * 60, "blue")), "nothing supervised"),
    }
    return good, bad, bad_at_loading


def test_nothing_more_than_what_was_planted_is_skipped(spec, image_root, record):
    good, bad, bad_at_loading = planted(record)
    records = [*(r for r, _ in bad.values()), *good, *(r for r, _ in bad_at_loading.values())]
    dataset = InstructDataset(records, spec=spec, image_root=str(image_root), max_length=100)
    assert [sample.id for sample in dataset.bad] == list(bad)
    for sample in dataset.bad:
        assert bad[sample.id][1] in sample.reason
    loaded = [dataset[i] for i in range(len(dataset))]
    assert [s.id for s in loaded if isinstance(s, Sample)] == [str(r["id"]) for r in good]
    found = {s.id: s.reason for s in loaded if isinstance(s, BadSample)}
    assert list(found) == list(bad_at_loading)
    for sample_id, reason in found.items():
        assert bad_at_loading[sample_id][1] in reason


def test_raise_names_the_samples(spec, image_root, record):
    good, bad, _ = planted(record)
    arguments = {"spec": spec, "image_root": str(image_root), "on_bad": "raise"}
    with pytest.raises(ValueError, match=r"2 of 10 samples can't be used: 'no turns': .*'tags'"):
        InstructDataset([bad["no turns"][0], bad["tags"][0], *good], **arguments)
    dataset = InstructDataset([record("x", image="none.png")], **arguments)
    with pytest.raises(ValueError, match=r"'x'.*not found"):
        dataset[0]


def old_file(tmp_path, record):
    """A file of an hour ago: a clock as coarse as a file system's may not tell writes apart."""
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record(name)) + "\n" for name in ("a", "b")))
    os.utime(path, (time.time() - 3600,) * 2)
    return path


@pytest.mark.parametrize("on_bad", ["skip", "raise"])
def test_a_file_touched_before_the_first_read_stops_the_run(spec, tmp_path, record, on_bad):
    path = old_file(tmp_path, record)
    dataset = InstructDataset(str(path), spec=spec, on_bad=on_bad)
    path.touch()
    for read in (dataset.__getitem__, dataset.record, dataset.exact_size):
        with pytest.raises(RuntimeError, match=r"records.jsonl has changed since the run began"):
            read(0)


def test_a_file_written_over_after_the_first_read_stops_the_run(spec, tmp_path, record):
    path = old_file(tmp_path, record)
    dataset = InstructDataset(str(path), spec=spec)
    assert dataset[0].id == "a"
    text = path.read_text()
    with path.open("r+") as file:  # in place: the same file, of the same size
        file.write(text.replace("blue", "pink"))
    with pytest.raises(RuntimeError, match=r"records.jsonl has changed since the run began"):
        dataset[1]


def test_no_usable_sample_is_an_error(spec, record):
    with pytest.raises(ValueError, match="none of 1 samples can be used: 'x'"):
        InstructDataset([record("x", texts=())], spec=spec)
    with pytest.raises(ValueError, match="none of 0 samples"):
        InstructDataset([], spec=spec)


def test_lengths_and_modalities(spec, record):
    records = [
        record("text", texts=("word " * 40, "x")),
        record("image", image="a.png", texts=("what?", "blue")),
        record("two", image=["a.png", "b.png"], texts=("what?", "blue")),
        record("chinese", texts=("图" * 60, "x")),
        record("cut", texts=("word " * 4000, "x")),
    ]
    dataset = InstructDataset(records, spec=spec, max_length=512)
    assert dataset.lengths().tolist() == [51, 7, 11, 46, 512]
    assert dataset.sizes().squares.tolist() == [0, 1, 2, 0, 0]
    assert dataset.has_images().tolist() == [False, True, True, False, False]
    assert dataset.has_images().dtype == bool


def test_ids_are_given_where_the_annotations_have_none(spec, record):
    records = [record("a"), {"conversations": record("b")["conversations"]}]
    dataset = InstructDataset(records, spec=spec)
    assert [dataset[i].id for i in range(2)] == ["a", "1"]


def test_resize_is_the_encoders_unless_given(spec, image_root, record):
    records, arguments = [record("x", image="a.png")], {"image_root": str(image_root)}
    image = load_image(image_root / "a.png")
    own = InstructDataset(records, spec=spec, **arguments)[0].pixel_values[0]
    assert torch.equal(own, transform(image, spec.image, resize="crop"))
    padded = InstructDataset(records, spec=spec, resize="pad", **arguments)[0].pixel_values[0]
    assert torch.equal(padded, transform(image, spec.image, resize="pad"))
    with pytest.raises(ValueError, match="resize must be"):
        InstructDataset(records, spec=spec, resize="tile", **arguments)
    with pytest.raises(ValueError, match="on_bad must be"):
        InstructDataset(records, spec=spec, on_bad="ignore", **arguments)


def test_truncation_is_reported_with_the_sample(spec, record):
    dataset = InstructDataset(
        [record("x", texts=("what?", "blue " * 50))], spec=spec, max_length=30
    )
    sample = dataset[0]
    assert len(sample.input_ids) == 30
    assert sample.num_truncated > 0
    assert f"{sample.num_truncated} tokens cut" in dataset.describe(0)


def test_describe_marks_what_is_supervised(spec, image_root, record):
    records = [record("x", image="a.png", texts=("what?", "blue")), record("y", image="none.png")]
    dataset = InstructDataset(records, spec=spec, image_root=str(image_root))
    assert dataset.describe(0) == "[x] <image>*4what?« blue<|im_end|>»"
    assert "can't be used: image not found" in dataset.describe(1)


def test_workers_give_what_the_main_process_gives(spec, image_root, record):
    good, _, bad_at_loading = planted(record)
    records = good + [r for r, _ in bad_at_loading.values()]
    dataset = InstructDataset(records, spec=spec, image_root=str(image_root), max_length=100)
    arguments = {"batch_size": 4, "collate_fn": Collator(spec)}
    alone = list(DataLoader(dataset, **arguments))
    with_workers = list(DataLoader(dataset, num_workers=1, **arguments))
    assert len(alone) == len(with_workers) == 3
    for one, other in zip(alone, with_workers, strict=True):
        assert one["sample_ids"] == other["sample_ids"]
        assert one["bad_samples"] == other["bad_samples"]
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["pixel_values"], other["pixel_values"])


def test_a_spawned_worker_can_have_the_dataset(spec, record):
    dataset = InstructDataset([record("x")], spec=spec)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[0].input_ids, dataset[0].input_ids)
