import json
import math
import os
import pickle

import pytest

from covft.datasets import record_file
from covft.datasets.record_file import RecordFile

RECORDS = [{"id": "ä", "n": 1}, {"id": 'a"]},[{', "n": [1, {"x": "图\\"}]}, {}, {"id": "\u2028 x"}]
LAYOUTS = {
    "compact": dict(separators=(",", ":")),
    "plain": dict(ensure_ascii=False),
    "indented": dict(indent=2, ensure_ascii=False),
}


def all_read(file):
    found = [(start, size) for start, size, _ in file.scan()]
    assert [record for *_, record in file.scan()] == [file.read(*place) for place in found]
    return [file.read(*place) for place in found]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_lists_are_read_in_place(tmp_path, monkeypatch, layout, bom, block):
    monkeypatch.setattr(record_file, "_BLOCK", block)
    path = tmp_path / "records.json"
    path.write_bytes(bom + f" {json.dumps(RECORDS, **LAYOUTS[layout])}\n ".encode())
    assert all_read(RecordFile(path)) == RECORDS


@pytest.mark.parametrize("layout", ["compact", "plain"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n \n"])
def test_lines_are_read_in_place(tmp_path, layout, bom, end):
    path = tmp_path / "records.jsonl"
    path.write_bytes(bom + end.join(json.dumps(r, **LAYOUTS[layout]) for r in RECORDS).encode())
    assert all_read(RecordFile(path)) == RECORDS


def test_what_only_pythons_parser_takes(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text('{"score": NaN}\n{"text": "\\ud83d"}\n')
    found = [record for *_, record in RecordFile(path).scan()]
    assert math.isnan(found[0]["score"])
    assert found[1] == {"text": "\ud83d"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": 1}', "holds no list of records; name it .jsonl"),
        ("", "holds no list"),
        ('[{"id": 1}, {"id" 2}]', "in record 1, which begins at byte 12"),
        ('[{"id": 1}, {"id": "abc', "in record 1, which begins at byte 12"),
        ('[{"id": 1}', "the list isn't closed"),
        ('[{"id": 1},', "the list isn't closed"),
        ('[{"id": 1} {"id": 2}]', "a comma too many or few, byte 11"),
        ('[{"id": 1},]', "a comma too many or few"),
        ('[,{"id": 1}]', "a comma too many or few"),
        ('[{"id": 1}] []', "there is more after the list's end"),
        ("[] ,", "there is more after the list's end"),
        ('[{"id": 1}],\n', "there is more after the list's end"),
    ],
)
def test_broken_lists_name_the_place(tmp_path, text, message):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"broken.json .*{message}"):
        list(RecordFile(path).scan())


def test_other_broken_files(tmp_path, monkeypatch):
    path = tmp_path / "latin.json"
    path.write_bytes('[{"id": "ä"}]'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.json is no UTF-8 text"):
        list(RecordFile(path).scan())
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{}\n{"id": "ä"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.jsonl, line 2 is no valid JSON"):
        list(RecordFile(path).scan())
    # An unclosed string isn't looked for through gigabytes.
    monkeypatch.setattr(record_file, "_LONGEST_RECORD", 100)
    monkeypatch.setattr(record_file, "_BLOCK", 50)
    path = tmp_path / "open.json"
    path.write_text('[{"id": "' + "x" * 10_000 + '"}]')
    with pytest.raises(ValueError, match="in record 0"):
        list(RecordFile(path).scan())


def test_a_file_that_changes_is_not_read_at_old_places(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"id": 1}\n{"id": 2}\n')
    file = RecordFile(path)
    places = [(start, size) for start, size, _ in file.scan()]
    assert file.read(*places[1]) == {"id": 2}
    copy = pickle.loads(pickle.dumps(file))
    path.write_text('{"id": 12345}\n')
    for reader in (file, copy):  # the first holds it open
        with pytest.raises(RuntimeError, match="has changed since the run began"):
            reader.read(*places[0])
    path.unlink()
    with pytest.raises(RuntimeError, match="can't be read any more"):
        pickle.loads(pickle.dumps(file)).read(*places[0])
    with pytest.raises(ValueError, match="annotation file not found"):
        RecordFile(path)


def test_a_file_that_changes_while_it_is_gone_through(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"id": 1}\n{"id": 2}\n')
    found = RecordFile(path).scan()
    next(found)
    path.write_text('{"id": 1}\n{"id": 2}\n{"id": 3}\n')
    with pytest.raises(RuntimeError, match="has changed since the run began"):
        list(found)


def test_a_place_that_holds_no_record_is_a_change(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"id": 1}\n')
    with pytest.raises(RuntimeError, match="has changed since the run began"):
        RecordFile(path).read(2, 5)


def test_a_copy_has_a_descriptor_of_its_own(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"id": 1}\n')
    file = RecordFile(path)
    file.read(0, 10)
    copy = pickle.loads(pickle.dumps(file))
    del file
    assert copy.read(0, 10) == {"id": 1}
    descriptor = copy._descriptor
    del copy
    with pytest.raises(OSError):
        os.fstat(descriptor)
