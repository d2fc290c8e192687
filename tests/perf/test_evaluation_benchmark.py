import json
import runpy
import sys
from pathlib import Path

import pytest
from untrained_run import untrained_run

from covft.perf.evaluation import Settings, measure

TOOL = Path(__file__).parents[2] / "tools" / "benchmark.py"
SMALL = ("--questions", 6, "--batch-size", 4, "--new-tokens", 2, "--rounds", 1)


def benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: object
) -> dict:
    arguments = ["evaluation", "--malloc", "default", *SMALL, *more]
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    runpy.run_path(str(TOOL), run_name="__main__")
    *shown, line = capsys.readouterr().out.splitlines()
    assert any(said.startswith("overhead") for said in shown)
    return json.loads(line)


def test_the_overhead_of_the_evaluator(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = benchmark(monkeypatch, capsys)
    seconds = found["seconds"]
    assert found["settings"]["questions"] == 6 and found["settings"]["run"] is None
    assert seconds.keys() == {"bare generation", "evaluator"} and min(seconds.values()) > 0
    ratio = seconds["evaluator"] / seconds["bare generation"]
    assert found["overhead"] == pytest.approx(ratio - 1, abs=1e-2 * ratio)


def test_a_run_is_measured(
    tiny_options,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = untrained_run(tmp_path / "run", tiny_options)
    before = sorted(run.rglob("*"))
    found = benchmark(monkeypatch, capsys, "--run", run)
    assert found["settings"]["run"] == str(run)
    assert sorted(run.rglob("*")) == before


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="rounds must be positive, got 0"):
        measure(Settings(rounds=0))
