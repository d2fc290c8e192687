import json

import numpy as np
import pytest

from covft.perf import data
from covft.perf.data import Settings, measure, table
from covft.perf.timing import json_line


@pytest.fixture(scope="module")
def result():
    return measure(
        Settings(
            rounds=1,
            width=60,
            height=40,
            image_size=16,
            records=3000,
            reads=20,
            start_methods=("fork",),
        )
    )


def test_images_are_those_of_pil(result):
    assert result["images"]["pixel_difference"] == 0


def test_figures_of_an_image_are_those_of_one(monkeypatch, tmp_path):
    settings = Settings(rounds=3, width=20, height=10, image_size=8)
    paths = data._write_images(tmp_path, settings)

    def timed(functions, *, rounds, device):
        assert rounds == 3 and all(len(made()) == 8 for made in functions.values())
        return {"PIL": 0.8, "ours": 0.4}

    monkeypatch.setattr(data, "interleaved_medians", timed)
    found = data._measure_images(settings, paths)
    assert found["ms"] == {"PIL": pytest.approx(100), "ours": pytest.approx(50)}
    assert found["ratio"] == pytest.approx(0.5)


def test_annotations_are_opened_faster_again_and_travel_light(result):
    found = result["annotations"]
    assert 800 < found["bytes"] / found["records"] < 1200
    assert found["cpu_seconds"]["again"] < 0.3 * found["cpu_seconds"]["first"]
    assert found["dataset_bytes"] < 4 * 3000 + 5000
    worker = found["workers"]["fork"]
    assert worker["added"]["uss"] < 20 * 2**20 < worker["single"]["rss"]


def test_memory_of_ones_own_is_seen():
    before = data.process_memory()
    held = np.ones(1 << 26)  # the kernel may take some MB of idle pages back meanwhile
    after = data.process_memory()
    for kind in ("uss", "rss"):
        assert after[kind] - before[kind] > 0.9 * held.nbytes


def test_the_table_and_the_json_hold_every_figure(result):
    text = table(result)
    for word in (
        "ours / PIL",
        "pixel difference",
        "first",
        "again",
        "worker (fork), uss",
        "pillow",
    ):
        assert word in text
    assert json.loads(json_line(result))["settings"]["records"] == 3000


def test_impossible_settings_are_explained():
    with pytest.raises(ValueError, match=r"at least 1, got .*records=0"):
        measure(Settings(records=0))
