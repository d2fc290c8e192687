import json
import logging
import pickle

import numpy as np
import pytest

from covft.conversation import get_template
from covft.datasets import InstructDataset, record_index
from covft.datasets.annotations import RecordCheck
from covft.datasets.record_file import RecordFile
from covft.datasets.record_index import RecordIndex


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COVFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(record_index, "_SMALLEST_CACHED", 0)
    return tmp_path / "cache" / "annotations"


@pytest.fixture
def path(tmp_path, record):
    records = [
        record("a", image="a.png"),
        record("b"),
        record("bad", texts=()),
        {k: v for k, v in record("x", texts=("what?",)).items() if k != "id"},
        record("two", image=["a.png", "b.png"]),
    ]
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records, indent=1))
    return path


def check_of(**changes):
    return RecordCheck(
        **{"template": get_template("qa"), "resize": None, "tile_size": 8, **changes}
    )


@pytest.fixture
def scans(monkeypatch):
    """The files that are gone through."""
    found = []
    scan = RecordFile.scan
    monkeypatch.setattr(RecordFile, "scan", lambda file: found.append(file.path) or scan(file))
    return found


def test_a_file_is_gone_through_once(path, scans, cache):
    first = RecordIndex.of_file(RecordFile(path), check_of())
    again = RecordIndex.of_file(RecordFile(path), check_of())
    assert scans == [path]
    assert isinstance(again.rows, np.memmap)
    assert (first.rows == again.rows).all() and first.bad == again.bad
    assert again.rows["usable"].tolist() == [True, True, False, False, True]
    assert again.rows["num_images"].tolist() == [1, 0, 0, 0, 2]
    assert [(bad.number, bad.id) for bad in again.bad] == [(2, "bad"), (3, None)]
    assert not [entry for entry in cache.iterdir() if entry.name.endswith(".partial")]


def test_another_content_or_check_is_another_index(path, scans):
    RecordIndex.of_file(RecordFile(path), check_of())
    plain = RecordIndex.of_file(RecordFile(path), check_of(template=get_template("plain")))
    assert len(scans) == 2 and plain.rows["usable"].sum() == 3
    path.write_text(path.read_text().replace('"bad"', '"BAD"'))
    changed = RecordIndex.of_file(RecordFile(path), check_of())
    assert len(scans) == 3 and changed.bad[0].id == "BAD"


def test_a_cache_that_cannot_be_written_is_done_without(path, scans, cache, spec, monkeypatch):
    said = []
    monkeypatch.setattr(
        record_index,
        "print_log",
        lambda text, *, level=logging.INFO, **_: said.append((level, text)),
    )
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    dataset = InstructDataset(str(path), spec=spec)
    assert [dataset[i].id for i in range(2)] == ["a", "b"]
    (warning,) = [text for level, text in said if level == logging.WARNING]
    assert "can't be kept" in warning and "set COVFT_CACHE" in warning
    assert scans == [path]
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.lengths().tolist() == dataset.lengths().tolist()


def test_small_files_leave_nothing_in_the_cache(path, cache, monkeypatch):
    monkeypatch.setattr(record_index, "_SMALLEST_CACHED", 1 << 20)
    assert RecordIndex.of_file(RecordFile(path), check_of()).folder is None
    assert not cache.exists()


def test_a_broken_file_leaves_nothing_in_the_cache(path, cache):
    path.write_text(path.read_text()[:-5])
    with pytest.raises(ValueError, match="in record 4"):
        RecordIndex.of_file(RecordFile(path), check_of())
    assert not [entry for entry in cache.iterdir() if not entry.name.endswith(".lock")]


def test_a_dataset_travels_without_its_records(tmp_path, spec, record):
    path = tmp_path / "many.jsonl"
    path.write_text(
        "\n".join(json.dumps(record(str(i), texts=("x" * 500, "y"))) for i in range(2000))
    )
    dataset = InstructDataset(str(path), spec=spec)
    without = InstructDataset([record("x")], spec=spec)
    # Four bytes a sample for the numbers of those that are used; a megabyte would be all of it.
    assert len(pickle.dumps(dataset)) - len(pickle.dumps(without)) < 4 * 2000 + 5000
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[1999].id == "1999"
    assert (copy.lengths() == dataset.lengths()).all()
