import argparse
import json

import pytest
import torch

from covft.perf import lmloss
from covft.perf.peak_memory import _summary, peak_memory
from covft.perf.timing import json_line

TINY = ["--tokens", "100", "--hidden", "16", "--vocabulary", "2000", "--rounds", "1"]
WAYS = {"full logits", "supervised logits", "ours"}
FLOAT = 4


def measured(*options: str) -> dict:
    parser = argparse.ArgumentParser()
    lmloss.add_arguments(parser)
    return lmloss.run(parser.parse_args([*TINY, *options]))


@pytest.fixture(scope="module")
def result() -> dict:
    return measured()


def test_figures_and_conditions(result: dict) -> None:
    read = json.loads(json_line(result))
    assert read["benchmark"] == "lmloss"
    assert read["supervised_positions"] == 16
    for part in ("ms", "speedup", "bytes", "memory_ratio", "peak_ratio"):
        assert read[part].keys() == WAYS
    assert read["speedup"]["full logits"] == read["memory_ratio"]["full logits"] == 1
    assert min(read["ms"].values()) > 0
    assert {"torch", "cpu", "threads", "malloc", "device"} <= read["conditions"].keys()
    assert all(name in lmloss.table(result) for name in WAYS)
    assert result["errors"].keys() == {"supervised logits", "ours"}
    assert max(result["errors"].values()) < 1e-12


@pytest.mark.parametrize("freeze", [False, True])
def test_memory_is_that_of_the_formulas(freeze: bool) -> None:
    logits = 100 * 2000 * FLOAT
    weight, states = 2000 * 16 * FLOAT, 100 * 16 * FLOAT
    held = measured(*(["--freeze"] if freeze else []))["bytes"]
    gradients = states + (0 if freeze else weight)
    assert {way["kept"] for way in held.values()} == {gradients}
    # At most: the log-probabilities, their gradient, and that of the logits.
    assert held["full logits"]["temporary"] == pytest.approx(3 * logits, rel=0.05)
    assert held["supervised logits"]["temporary"] == pytest.approx(0.16 * 3 * logits, rel=0.05)
    # The logits, which become their gradient in place.
    assert held["ours"]["temporary"] == pytest.approx(0.16 * logits, rel=0.1)
    assert held["ours"]["peak"] == pytest.approx(0.16 * logits + gradients, rel=0.1)


def test_impossible_shares_are_explained() -> None:
    for share in ("0.001", "1"):
        with pytest.raises(ValueError, match="1 to 99 are possible"):
            measured("--supervised", share)


def test_peak_memory_of_a_known_function() -> None:
    older, kept = [torch.ones(1000)], []

    def run() -> None:
        older.clear()  # what it frees of before makes no room
        one = torch.ones(500)
        kept.append(torch.ones(300))
        two = one + 1
        del one
        two += torch.ones(500)

    found = peak_memory(run, device=torch.device("cpu"))
    assert found.kept == 300 * FLOAT
    assert found.temporary == pytest.approx(1000 * FLOAT, rel=0.01)  # and scalars
    assert found.peak == pytest.approx(1300 * FLOAT, rel=0.01)


def test_addresses_are_used_again() -> None:
    found = _summary([(7, 10), (9, -99), (7, -10), (7, 20), (8, 5), (8, -5)])
    assert (found.peak, found.kept, found.temporary) == (25, 20, 10)
