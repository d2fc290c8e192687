"""Files of answers: torn lines, foreign files, parts of several processes."""

import json
import os
from pathlib import Path

import pytest

from covft.evaluation import Benchmark, Item, read_predictions
from covft.evaluation.evaluate import score_predictions
from covft.evaluation.predictions import (
    PredictionWriter,
    Record,
    asked_digests,
    gather,
    load,
    only_writer,
    read_fingerprint,
    shard_path,
)

ASKED = {"a": "1", "b": "2", "c": "3"}
PRINT = {"weights": "w", "model": "x = 1\ny = 2\n"}


def write(path: Path, *answers: tuple[str, str], fingerprint=PRINT, error=None) -> None:
    with PredictionWriter(path, fingerprint) as writer:
        writer.add([Record(key, ASKED.get(key, "?"), text, error) for key, text in answers])


def test_a_line_is_on_the_disk_at_once_and_a_torn_one_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with PredictionWriter(path, PRINT) as writer:
        writer.add([Record("b", "2", "yes\n\u2028"), Record("a", "1", "nö")])
        found = load(path, PRINT, ASKED)
    assert {key: record.prediction for key, record in found.items()} == {
        "a": "nö",
        "b": "yes\n\u2028",
    }
    with path.open("a") as file:
        file.write('{"id": "c", "asked": "3", "pred')
    assert set(load(path, PRINT, ASKED)) == {"a", "b"}
    gather(path, PRINT, ASKED, keep_errors=True)
    lines = path.read_text().split("\n")
    assert [json.loads(line).get("id") for line in lines[:-1]] == [None, "a", "b"]
    assert lines[-1] == "" and read_predictions(path) == {"a": "nö", "b": "yes\n\u2028"}


@pytest.mark.parametrize("content", ["", '{"finger'])
def test_a_file_killed_at_birth_is_no_obstacle(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    assert gather(path, PRINT, ASKED, keep_errors=True) == {}
    assert len(list(tmp_path.iterdir())) == 1


def test_parts_are_merged_once_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "gqa.jsonl"
    write(path, ("c", "old"))
    for rank, answers in enumerate(([("b", "yes")], [("a", "no"), ("c", "again")])):
        write(shard_path(path, rank=rank, world_size=2), *answers)
    write(tmp_path / "gqa2.rank0-of-2.jsonl", ("a", "another benchmark's"))
    expected = {"a": "no", "b": "yes", "c": "old"}
    assert {k: r.prediction for k, r in load(path, PRINT, ASKED).items()} == expected
    gather(path, PRINT, ASKED, keep_errors=True)
    once = path.read_bytes()
    assert list(read_predictions(path).items()) == list(expected.items())
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "gqa.jsonl",
        "gqa2.rank0-of-2.jsonl",
    ]
    gather(path, PRINT, ASKED, keep_errors=True)
    assert path.read_bytes() == once


def test_an_answer_takes_the_place_of_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write(path, ("a", ""), error="disk gone")
    write(shard_path(path, rank=1, world_size=3), ("a", "yes"), ("b", "no"))
    gather(path, PRINT, ASKED, keep_errors=True)
    assert read_predictions(path) == {"a": "yes", "b": "no"}
    assert "disk gone" not in path.read_text()


def test_errors_are_forgotten_where_they_are_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write(path, ("a", ""), error="disk gone")
    assert gather(path, PRINT, ASKED, keep_errors=True)["a"].error == "disk gone"
    assert gather(path, PRINT, ASKED, keep_errors=False) == {}


def test_a_mended_row_was_asked_nothing_else_before(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write(path, ("a", "yes"))
    write(path, ("b", ""), error="row 2 has no options")
    mended = {**ASKED, "b": "9"}
    assert set(load(path, PRINT, mended)) == {"a", "b"}
    assert set(gather(path, PRINT, mended, keep_errors=False)) == {"a"}
    assert [file.name for file in tmp_path.iterdir()] == ["x.jsonl"]


def test_a_file_has_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.jsonl"
    with (
        only_writer(path),
        pytest.raises(ValueError, match=r"x\.jsonl is being written by another run"),
        only_writer(path),
    ):
        pass
    with only_writer(path):
        assert not path.exists()


def test_parts_that_belong_to_different_things_have_no_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with pytest.raises(ValueError, match="answer the questions first"):
        read_fingerprint(path)
    write(path, ("a", "yes"))
    part = shard_path(path, rank=0, world_size=2)
    part.write_text("")  # killed at birth
    assert read_fingerprint(path) == PRINT
    write(part, ("b", "yes"), fingerprint={**PRINT, "weights": "v"})
    with pytest.raises(ValueError, match="don't belong together:\nweights: v in the file, w here"):
        read_fingerprint(path)


@pytest.mark.parametrize(
    ("fingerprint", "asked", "message"),
    [
        ({**PRINT, "weights": "v"}, ASKED, "weights: w in the file, v here"),
        ({**PRINT, "model": "x = 1\ny = 3\n"}, ASKED, r"model:\n-y = 2\n\+y = 3"),
        (PRINT, {**ASKED, "b": "9"}, "1 of its items were asked something else.*first is 'b'"),
    ],
)
def test_what_belongs_to_something_else_is_explained_and_put_aside(
    tmp_path: Path, fingerprint, asked, message: str
) -> None:
    path = tmp_path / "x.jsonl"
    write(path, ("a", "yes"), ("b", "no"))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        load(path, fingerprint, asked)
    assert path.read_bytes() == before
    assert gather(path, fingerprint, asked, keep_errors=True) == {}
    assert (tmp_path / "x.jsonl.old1").read_bytes() == before
    gather(path, {**fingerprint, "weights": "third"}, ASKED, keep_errors=True)
    assert (tmp_path / "x.jsonl.old2").exists()


def test_a_damaged_file_and_one_of_another_version(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"fingerprint": "0123"}\n{"id": "a", "prediction": "yes"}\n')
    with pytest.raises(ValueError, match="written by another version"):
        load(path, PRINT, ASKED)
    write(tmp_path / "y.jsonl", ("a", "yes"), ("b", "no"))
    whole = (tmp_path / "y.jsonl").read_text().replace('"b"', '"b')
    path.write_text(whole)
    with pytest.raises(ValueError, match=r"x.jsonl is damaged: .*; remove it"):
        gather(path, PRINT, ASKED, keep_errors=True)
    with pytest.raises(ValueError, match="answer the questions first"):
        read_predictions(tmp_path / "absent.jsonl")


class Two(Benchmark):
    name = "two"
    question = "what is it?"
    image = "images/1.png"

    def read_items(self) -> list[Item]:
        image = os.path.normpath(self.root / self.image)
        return [Item(key, self.question, "red", (image,), context="it") for key in "ab"]

    def is_correct(self, prediction: str, item: Item) -> bool:
        return prediction == item.answer


def test_digests_are_of_what_is_asked_and_not_of_where_the_data_is(tmp_path: Path) -> None:
    here = asked_digests(Two(root=str(tmp_path)))
    assert here == asked_digests(Two(root=str(tmp_path / "moved")))
    beside = Two(root=str(tmp_path / "here" / "two"))
    beside.image = "../COCO/1.png"
    moved = Two(root=str(tmp_path / "moved" / "two"))
    moved.image = "../COCO/1.png"
    assert asked_digests(beside) == asked_digests(moved) != here
    other = Two(root=str(tmp_path))
    other.question = "what's that?"
    assert not set(asked_digests(other).values()) & set(here.values())


def test_scoring_needs_answers_to_all_questions(tmp_path: Path) -> None:
    benchmark, path = Two(root=str(tmp_path)), tmp_path / "two.jsonl"
    asked = asked_digests(benchmark)
    with PredictionWriter(path, PRINT) as writer:
        writer.add([Record("a", asked["a"], "red")])
    with pytest.raises(ValueError, match="1 of 2 items have no prediction, the first is 'b'"):
        score_predictions(benchmark, path, expected=PRINT)
    with PredictionWriter(path, PRINT) as writer:
        writer.add([Record("b", asked["b"], " ")])
    result = score_predictions(benchmark, path, expected={"weights": "w"})
    assert result.metrics == {"accuracy": 50.0} and result.empty == ("b",)
