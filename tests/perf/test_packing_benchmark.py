import json

import pytest

from covft.perf.packing import Settings, measure, table
from covft.perf.timing import json_line


@pytest.fixture(scope="module")
def result():
    return measure(Settings(samples=4000, steps=15))


def test_packed_micro_batches_are_full(result):
    packed = result["modes"]["packed"]
    assert packed["token_efficiency"] >= 0.98 and packed["cost_efficiency"] >= 0.99
    assert packed["largest"] < 1.25
    for name, mode in result["modes"].items():
        assert mode["tokens"] / mode["positions"] == pytest.approx(mode["token_efficiency"])
        assert mode["cost"] / mode["bound"] == pytest.approx(mode["cost_efficiency"])
        if name != "packed":
            assert mode["token_efficiency"] < 0.9
            assert result["speedup"][name] > 1.1
    # Steps of packed and unpacked random batches hold the same samples.
    assert packed["tokens"] == result["modes"]["padded, random"]["tokens"]


def test_the_lengths_are_those_that_are_claimed(result):
    lengths = result["lengths"]
    assert lengths["text"] == pytest.approx(308, rel=0.05)
    assert lengths["text_only_share"] == pytest.approx(lengths["wanted_text_only_share"], abs=0.01)
    assert lengths["longest"] <= 2048


def test_the_table_and_the_json_hold_every_figure(result):
    text = table(result)
    for word in ("packed", "by modality", "log-normal", "ranks: 8", "plan, ms"):
        assert word in text
    assert json.loads(json_line(result))["modes"].keys() == result["modes"].keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": 0}, "must be positive"),
        ({"samples": 100}, "100 are fewer than the 128 of a step"),
        ({"max_length": 500, "samples": 200}, "must exceed an image's 576 tokens"),
    ],
)
def test_impossible_settings_are_explained(change, message):
    with pytest.raises(ValueError, match=message):
        measure(Settings(**change))
