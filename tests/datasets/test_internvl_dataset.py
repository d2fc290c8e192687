import json

import pytest

from covft.datasets import BadSample, InternVLDataset, Tiles
from covft.registry import DATASETS


@pytest.fixture
def meta(tmp_path, image_root, record):
    """Writes a data set of four records, and gives its entry with the changes asked for."""

    def build(**changes):
        records = [
            record("a", image="a.png"),
            record("b", image=["a.png", "b.png"]),
            record("c"),
            record("d", image="c.jpg"),
        ]
        path = tmp_path / "records.jsonl"
        path.write_text("\n".join(json.dumps(r) for r in records))
        entry = {
            "root": str(image_root),
            "annotation": str(path),
            "data_augment": False,
            "repeat_time": 1,
            "length": 4,
        }
        return {"shapes": {**entry, **changes}}

    return build


def ids(dataset):
    return [dataset[index].id for index in range(len(dataset))]


def test_a_meta_file(spec, meta, tmp_path) -> None:
    entries = meta() | {"more": meta(max_dynamic_patch=2)["shapes"]}
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(entries))
    cfg = dict(type="InternVLDataset", meta=str(path), resize="tiles", max_tiles=6, on_bad="raise")
    dataset = DATASETS.build(cfg, default_args={"spec": spec})
    assert ids(dataset) == [f"{name}/{i}" for name in ("shapes", "more") for i in "abcd"]
    # 16 x 12 pixels: 3 x 2 tiles out of 6, one out of 3, 2 or 1.
    found = [len(dataset[index].pixel_values) for index in range(8)]
    assert found == [7, 2, 0, 7, 1, 2, 0, 1]
    assert dataset.resize == Tiles(6)
    assert dataset.lengths()[0] - dataset.lengths()[4] == 4 * spec.num_image_tokens


@pytest.mark.parametrize(
    ("repeat_time", "expected"),
    [(0.5, "ab"), (0.99, "abc"), (1, "abcd"), (2, "abcdabcd"), (3.0, "abcdabcdabcd")],
)
def test_repeat_time(spec, meta, repeat_time, expected: str) -> None:
    dataset = InternVLDataset(meta(repeat_time=repeat_time), spec=spec)
    assert ids(dataset) == [f"shapes/{i}" for i in expected]


def test_a_length_that_differs_warns(spec, meta, monkeypatch) -> None:
    said = []
    monkeypatch.setattr("covft.datasets.internvl.print_log", lambda text, **_: said.append(text))
    InternVLDataset(meta(), spec=spec)
    assert not said
    assert len(InternVLDataset(meta(length=5, repeat_time=2), spec=spec)) == 8
    assert len(said) == 1 and "the meta's length is 5, but" in said[0]
    assert "holds 4 records" in said[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_augment": True}, "data_augment=true .* isn't implemented"),
        ({"repeat_time": 1.5}, "whole number of repeats, .* got 1.5"),
        ({"repeat_time": 0}, "whole number of repeats, .* got 0"),
        ({"repeat_time": 0.1}, "repeat_time=0.1 of 4 records leaves none"),
        ({"root": None}, "'root' must be a path, got None"),
        ({"annotation": "none.jsonl"}, "annotation file not found: none.jsonl"),
        ({"repeat_times": 2}, "'repeat_times' is unknown; did you mean 'repeat_time'"),
        ({"max_dynamic_patch": 6}, "max_dynamic_patch has no effect without tiles"),
    ],
)
def test_entries_that_cannot_be_had_name_themselves(spec, meta, changes, message: str) -> None:
    with pytest.raises(ValueError, match=f"meta, 'shapes': .*{message}"):
        InternVLDataset(meta(**changes), spec=spec)


def test_max_dynamic_patch_must_be_a_number_of_tiles(spec, meta) -> None:
    with pytest.raises(ValueError, match="'shapes': max_tiles must be a positive whole number"):
        InternVLDataset(meta(max_dynamic_patch=0), spec=spec, resize="tiles", max_tiles=6)


def test_files_that_are_no_meta(spec, tmp_path) -> None:
    path = tmp_path / "meta.json"
    with pytest.raises(ValueError, match=r"meta file not found: .*meta.json"):
        InternVLDataset(str(path), spec=spec)
    for text, message in (("{", "no valid JSON"), ("[]", "holds an object"), ("{}", "at least")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            InternVLDataset(str(path), spec=spec)
    path.write_text('{"x": 3}')
    with pytest.raises(ValueError, match=r"meta.json, 'x': expected an object, got a int"):
        InternVLDataset(str(path), spec=spec)


def test_records_that_cannot_be_used_are_listed(spec, tmp_path, image_root, record) -> None:
    records = [
        record("good"),
        record("film") | {"video": "a.mp4"},
        record("odd", image=3),
        record("gone", image="none.png"),
    ]
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in records))
    entry = {"root": str(image_root), "annotation": str(path)}
    dataset = InternVLDataset({"x": entry}, spec=spec)
    assert [bad.id for bad in dataset.bad] == ["x/film", "x/odd"]
    assert "video, which isn't supported" in dataset.bad[0].reason
    assert isinstance(dataset[1], BadSample) and str(image_root) in dataset[1].reason
