import copy
import dataclasses
import json
import multiprocessing
import time

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers_for_tests import bert_tokenizer, byte_level_tokenizer

from covft.datasets import (
    BadSample,
    InstructDataset,
    InternVLDataset,
    MixtureDataset,
    token_lengths,
)
from covft.datasets.token_lengths import measured_sizes, tokenizer_key


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COVFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_lengths, "CHUNK", 4)
    return tmp_path / "cache" / "token_lengths"


@pytest.fixture
def records(record, image_root):
    Image.new("RGB", (40, 10)).save(image_root / "wide.png")
    return [
        record("short"),
        record("image", image="a.png", texts=("<image>\nwhat?", "blue")),
        record("pair", image=["a.png", "wide.png"], texts=("what? " * 9, "blue")),
        record("stated", image="none.png") | {"width": 40, "height": 10},
        record("long", texts=("why?", "so " * 90)),
        record("nothing left", texts=("why? " * 90, "so")),
        record("chinese", texts=("图" * 9, "好 🙂")),
    ]


@pytest.fixture
def measured(monkeypatch):
    """The indices that are tokenised."""
    found = []
    exact_size = InstructDataset.exact_size
    monkeypatch.setattr(
        InstructDataset, "exact_size", lambda self, i: found.append(i) or exact_size(self, i)
    )
    return found


@pytest.mark.parametrize("tiling", [{}, {"resize": "tiles", "max_tiles": 4}])
def test_sizes_are_those_of_the_samples(spec, records, image_root, tiling):
    dataset = InstructDataset(
        records, spec=spec, image_root=str(image_root), max_length=60, **tiling
    )
    tokens, squares = dataset.exact_sizes()
    for index in range(len(dataset)):
        sample = dataset[index]
        if records[index]["id"] == "stated":  # an image is first missed when it's opened
            assert squares[index] == (5 if tiling else 1)
        elif isinstance(sample, BadSample):
            assert (tokens[index], squares[index]) == (0, 0)
        else:
            assert tokens[index] == len(sample.input_ids)
            assert squares[index] == len(sample.pixel_values)
    assert tokens.max() == 60 and (tokens == 0).sum() == 1
    assert (squares <= dataset.sizes().squares).all()


def test_nothing_is_tokenised_twice(spec, records, measured):
    dataset = InstructDataset(records, spec=spec)
    first = measured_sizes(dataset)
    assert measured == list(range(7))
    again = measured_sizes(InstructDataset(records, spec=spec))
    assert len(measured) == 7 and (first == again).all() and again.dtype == np.int64


@pytest.mark.parametrize("what", ["tokenizer", "max_length", "records", "fraction"])
def test_what_they_depend_on_makes_others(spec, records, measured, what):
    measured_sizes(InstructDataset(records, spec=spec))
    other = copy.deepcopy(byte_level_tokenizer())  # other tests have the same one
    other.add_tokens(["what"])
    changes = {
        "tokenizer": dict(spec=dataclasses.replace(spec, tokenizer=other)),
        "max_length": dict(spec=spec, max_length=50),
        "records": dict(spec=spec),
        "fraction": dict(spec=spec, fraction=0.5),
    }[what]
    changed = records[::-1] if what == "records" else records
    measured.clear()
    dataset = InstructDataset(changed, **changes)
    measured_sizes(dataset)
    assert len(measured) == len(dataset)


def test_only_what_a_killed_run_left_open_is_done(spec, records, measured, cache):
    dataset = InstructDataset(records, spec=spec)
    whole = measured_sizes(dataset)
    first, second = sorted(cache.glob("*/*.npy"))
    measured.clear()
    second.unlink()
    assert (measured_sizes(dataset) == whole).all()
    assert measured == [4, 5, 6]
    first.write_bytes(first.read_bytes()[:-3])  # torn by a power cut
    measured.clear()
    assert (measured_sizes(dataset) == whole).all()
    assert measured == [0, 1, 2, 3]


def test_ranks_share_the_work_and_none_waits(spec, records, measured):
    dataset = InstructDataset(records * 4, spec=spec)  # seven chunks
    begun = [measured_sizes(dataset, rank=rank, world_size=3) for rank in (1, 0, 2)]
    assert measured[:4] == [4, 5, 6, 7]  # the second chunk is the second rank's first
    assert sorted(measured) == list(range(28))
    assert all((sizes == begun[0]).all() for sizes in begun)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_find_the_same_and_draw_no_seed(spec, records, num_workers):
    dataset = InstructDataset(records * 2, spec=spec)
    state = torch.random.get_rng_state()
    tokens, _ = dataset.exact_sizes(num_workers=num_workers)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert tokens.tolist() == [dataset.exact_size(i)[0] for i in range(14)]


def test_without_a_cache_every_process_does_all(spec, records, cache, measured, monkeypatch):
    said = []
    monkeypatch.setattr(token_lengths, "print_log", lambda text, **_: said.append(text))
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    dataset = InstructDataset(records, spec=spec)
    sizes = measured_sizes(dataset, rank=1, world_size=2)
    assert len(sizes) == len(measured) == 7
    assert "can't be kept" in said[0]
    assert "7 of 7 samples" in said[-1]


def test_members_are_measured_once_whatever_their_weights(spec, records, measured):
    member = dict(type=InstructDataset, annotations=records)
    for weight in (2, 0.5):
        datasets = {"a": {**member, "weight": weight}, "b": dict(member, max_length=50)}
        mixture = MixtureDataset(datasets, spec=spec)
        tokens, squares = mixture.exact_sizes()
        assert len(tokens) == len(squares) == len(mixture)
        index = len(mixture) - 3
        assert tokens[index] == mixture.members["b"].exact_sizes().tokens[4] == 50
    assert len(measured) == 14


def test_tiles_of_a_meta_s_entry_count(spec, record, image_root, tmp_path):
    Image.new("RGB", (40, 10)).save(image_root / "wide.png")
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(record("x", image="wide.png")))
    entry = {"root": str(image_root), "annotation": str(path)}
    meta = {"few": {**entry, "max_dynamic_patch": 1}, "many": entry}
    dataset = InternVLDataset(meta, spec=spec, resize="tiles", max_tiles=4)
    assert dataset.exact_sizes().squares.tolist() == [1, 5]


def test_tokenizers_are_told_apart_by_what_they_do():
    assert tokenizer_key(byte_level_tokenizer()) == tokenizer_key(byte_level_tokenizer())
    assert tokenizer_key(byte_level_tokenizer()) != tokenizer_key(bert_tokenizer())


def test_a_call_leaves_the_key_alone():
    tokenizer = copy.deepcopy(byte_level_tokenizer())
    # What the backend keeps of a call; others at first sight, and on.
    key = tokenizer_key(tokenizer)
    tokenizer(["a", "a b c"], padding="max_length", truncation=True, max_length=2)
    state = tokenizer.backend_tokenizer
    assert state.padding is not None and state.truncation is not None
    assert tokenizer_key(tokenizer) == key


TILES = {"resize": "tiles", "max_tiles": 4}


@pytest.fixture
def said(monkeypatch):
    """What is logged."""
    found = []
    monkeypatch.setattr(token_lengths, "print_log", lambda text, **_: found.append(text))
    return found


def test_images_that_could_not_be_opened_are_tried_again(spec, record, image_root, measured, said):
    records = [
        record("there", image="a.png"),
        record("late", image="late.png"),
        record("nothing left", texts=("why? " * 90, "so")),
        *[record(str(i)) for i in range(3)],
    ]
    arguments = dict(spec=spec, image_root=str(image_root), max_length=60, **TILES)
    tokens, squares = InstructDataset(records, **arguments).exact_sizes()
    assert (tokens[1], squares[1]) == (tokens[2], squares[2]) == (0, 0)
    assert "2 of 6 samples can't be used, 1 for what their records hold and 1" in said[-1]
    measured.clear()
    assert InstructDataset(records, **arguments).exact_sizes().tokens[1] == 0
    assert measured == [1]  # nothing else is done again
    Image.new("RGB", (40, 10)).save(image_root / "late.png")
    dataset = InstructDataset(records, **arguments)
    tokens, squares = dataset.exact_sizes()
    assert (tokens[1], squares[1]) == (len(dataset[1].input_ids), 5)
    assert "1 of 6 samples can't be used, 1 for what their records hold and 0" in said[-1]
    measured.clear()
    assert dataset.exact_sizes().tokens.tolist() == tokens.tolist() and not measured


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_changed_file_is_no_unusable_sample(spec, record, tmp_path, cache, num_workers):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record(str(i))) + "\n" for i in range(3)))
    dataset = InstructDataset(str(path), spec=spec)
    path.write_text(path.read_text() + "\n")
    with pytest.raises(RuntimeError, match=r"records.jsonl has changed since the run began"):
        dataset.exact_sizes(num_workers=num_workers)
    assert not list(cache.glob("*/*.npy"))


class Slow:
    """Samples that take a tenth of a second each."""

    def __init__(self, spec):
        self.spec = spec

    def __len__(self):
        return 40

    def exact_size(self, index):
        time.sleep(0.1)
        return index, 1

    def fingerprint(self):
        return "slow"


def test_a_killed_process_goes_on_where_it_was(spec, cache):
    forked = multiprocessing.get_context("fork").Process(
        target=measured_sizes, args=(Slow(spec),), kwargs={"num_workers": 2}
    )
    forked.start()
    deadline = time.monotonic() + 60
    while len(kept := sorted(cache.glob("*/[0-9]*.npy"))) < 2:
        assert forked.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    forked.kill()
    forked.join()
    times = {path: path.stat().st_mtime_ns for path in kept}
    sizes = measured_sizes(Slow(spec), num_workers=2)
    assert sizes[:, 0].tolist() == list(range(40))
    assert len(list(cache.glob("*/[0-9]*.npy"))) == 10
    assert all(path.stat().st_mtime_ns == written for path, written in times.items())
