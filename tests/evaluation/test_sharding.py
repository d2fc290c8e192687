"""Sharing items among processes; two gloo processes and killed ones give what one gives."""

import json
from pathlib import Path

import pytest
from forks import run_script

from covft.evaluation import Item
from covft.evaluation.sharding import share


def items_of(*counts: int) -> list[Item]:
    """Return so many questions about each image, in turn."""
    rounds = range(max(counts, default=0))
    return [
        Item(f"{image}-{number}", "q", "", (f"{image}.png",))
        for number in rounds
        for image, count in enumerate(counts)
        if number < count
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("counts", [(), (1,), (5,), (3, 1, 4, 1, 5), (2,) * 20])
def test_every_item_is_asked_once_and_parts_are_even(counts, world_size: int) -> None:
    items = items_of(*counts)
    parts = [share(items, rank=rank, world_size=world_size) for rank in range(world_size)]
    ids = [item.id for part in parts for item in part]
    assert sorted(ids) == sorted(item.id for item in items)
    assert max(map(len, parts)) <= -(-len(items) // world_size)
    order = {item.id: index for index, item in enumerate(items)}
    assert all([order[i.id] for i in part] == sorted(order[i.id] for i in part) for part in parts)


def test_questions_on_one_image_stay_together() -> None:
    items = items_of(3, 3, 2, 2)
    parts = [share(items, rank=rank, world_size=2) for rank in range(2)]
    assert [{item.images[0] for item in part} for part in parts] == [
        {"0.png", "2.png"},
        {"1.png", "3.png"},
    ]
    texts = [Item(f"{index}", "q", "") for index in range(4)]
    assert [len(share(texts, rank=rank, world_size=2)) for rank in range(2)] == [2, 2]


@pytest.fixture(scope="module")
def report(tmp_path_factory, tokenizer_folders) -> dict:
    folder = tmp_path_factory.mktemp("processes")
    script = Path(__file__).with_name("evaluation_server.py")
    run_script(script, folder, tokenizer_folders)
    return json.loads((folder / "report.json").read_text())


def test_two_processes_equal_one(report: dict) -> None:
    assert report["one"] == report["two"] and len(report["one"]["predictions"]) == 24
    assert len(set(report["one"]["predictions"].values())) > 6
    assert [name for name in report["files"] if not name.startswith(".")] == ["easy_vqa.jsonl"]
    assert report["asked"][0] and report["asked"][1]


def test_more_processes_than_items(report: dict) -> None:
    assert report["few"]["predictions"].items() <= report["one"]["predictions"].items()
    assert len(report["few"]["predictions"]) == 1


def test_killed_processes_go_on_also_in_another_number(report: dict) -> None:
    assert report["kills"] >= 6
    assert report["killed"] == report["one"]
    assert report["resumed"] == report["one"]
    assert report["left_by_two"] == ["rank0-of-2", "rank1-of-2"]
