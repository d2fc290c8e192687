import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from covft.datasets import EasyVQADataset, Sample
from covft.datasets.easy_vqa import captions, conversations
from covft.registry import DATASETS

QUESTIONS = [
    ["what is the blue shape?", "rectangle", 0],
    ["is there a red shape?", "no", 0],
    ["what color is the circle?", "teal", 1],
    ["what color is the shape?", "red", 2],
    ["does the image contain a circle?", "yes", 2],
    ["what shape is in the image?", "triangle", 3],
    ["what color is the shape?", "gray", 3],
    ["is there a triangle?", "yes", 3],
    ["is there not a circle?", "yes", 3],
    ["is there a black shape?", "no", 3],
    ["is there not a black shape?", "yes", 4],
]


@pytest.fixture
def root(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "images").mkdir(parents=True)
        (tmp_path / split / "questions.json").write_text(json.dumps(QUESTIONS))
        for image_id in range(5):
            pixels = np.full((64, 64, 3), 40 * image_id, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / "images" / f"{image_id}.png")
    return str(tmp_path)


def asked(records):
    turns = [(r["image"], r["conversations"]) for r in records]
    return Counter(
        (image, t[n]["value"].removeprefix("<image>\n"), t[n + 1]["value"])
        for image, t in turns
        for n in range(0, len(t), 2)
    )


@pytest.mark.parametrize("max_turns", [None, 1, 2, 10])
def test_every_question_is_asked_once_of_its_image(root, max_turns):
    records = conversations(root, max_turns=max_turns)
    expected = Counter((f"train/images/{i}.png", q, a) for q, a, i in QUESTIONS)
    assert asked(records) == expected
    assert len({record["id"] for record in records}) == len(records)
    assert len(records) == {None: 5, 1: 11, 2: 7, 10: 5}[max_turns]
    for record in records:
        tags = [turn["value"].count("<image>") for turn in record["conversations"]]
        assert tags == [1] + [0] * (len(tags) - 1)
        assert len(tags) <= 2 * (max_turns or 10)


def test_the_order_of_questions_is_seeded(root):
    assert conversations(root) == conversations(root)
    orders = {json.dumps(conversations(root, seed=seed)) for seed in range(5)}
    assert len(orders) > 1


def test_captions_only_where_the_questions_settle_them(root):
    found = {r["image"]: r["conversations"][1]["value"] for r in captions(root)}
    assert found == {
        "train/images/0.png": "blue rectangle",
        "train/images/1.png": "teal circle",
        "train/images/3.png": "gray triangle",
    }


def test_the_dataset(root, spec):
    dataset = EasyVQADataset(root, spec=spec, split="test", max_turns=2)
    assert len(dataset) == 7
    assert dataset.bad == []
    samples = [dataset[i] for i in range(7)]
    assert all(isinstance(sample, Sample) for sample in samples)
    assert {int(sample.pixel_values[0, 0, 0, 0]) for sample in samples} == {0, 40, 80, 120, 160}
    assert all(sample.id.startswith("easy-vqa/test/") for sample in samples)


def test_captions_by_name(root, spec):
    cfg = {"type": "EasyVQADataset", "root": root, "kind": "captions"}
    dataset = DATASETS.build(cfg, default_args={"spec": spec})
    assert "blue rectangle" in dataset.describe(0)
    assert len(dataset) == 3


def test_wrong_arguments(root, spec):
    with pytest.raises(ValueError, match="must hold train/ and test/"):
        EasyVQADataset(root, spec=spec, split="val")
    with pytest.raises(ValueError, match="kind must be"):
        EasyVQADataset(root, spec=spec, kind="caption")
    with pytest.raises(ValueError, match="no effect"):
        EasyVQADataset(root, spec=spec, kind="captions", max_turns=2)
    with pytest.raises(ValueError, match="max_turns must be positive"):
        EasyVQADataset(root, spec=spec, max_turns=0)


def test_balanced_keeps_open_questions_and_as_many_closed_ones(root):
    kept = asked(conversations(root, balanced=True))
    everything = Counter((f"train/images/{i}.png", q, a) for q, a, i in QUESTIONS)
    assert kept < everything
    for image in {image for image, *_ in everything}:
        closed = [k for k in kept if k[0] == image and k[2] in ("yes", "no")]
        opened = [k for k in everything if k[0] == image and k[2] not in ("yes", "no")]
        available = [k for k in everything if k[0] == image and k[2] in ("yes", "no")]
        assert all(k in kept for k in opened)
        assert len(closed) == min(len(available), max(len(opened), 1))
