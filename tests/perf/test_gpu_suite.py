"""The suite of all GPU measurements: its parts, its time, its files."""

import argparse
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from covft.config import CONFIG_ROOT, find_config
from covft.perf import gpu_suite

TRAIN = {
    "methods": {
        "CoVFT": {
            "seconds": 1.04,
            "samples_per_second": 30.0,
            "input_tokens_per_second": 26000.0,
            "tflops": 420.0,
            "mfu": 0.425,
            "peak_gib": 70.5,
        },
        "Full": {"error": "out of memory: CUDA out of memory"},
    },
    "ratios": {"CoVFT / Full": {"step time": dict(ratio=1.04, numerator=1.04, denominator=1.0)}},
}


def run(out: Path, *arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    gpu_suite.add_arguments(parser)
    return gpu_suite.run(parser.parse_args(["--dry-run", "--out", str(out), *arguments]))


@pytest.fixture
def fake(monkeypatch) -> list[tuple[str, float]]:
    """Replace the processes; return the parts that were started, with their limits."""
    started: list[tuple[str, float]] = []

    def process(arguments: list[str], limit: float, *, dry_run: bool) -> tuple[str, str, str]:
        started.append((arguments[0], limit))
        if arguments[0] == "inference":
            return "failed", "some table", "Traceback\nCUDA error: out of memory"
        if arguments[0] == "comoe":
            return "timed out", "", ""
        result = TRAIN if arguments[0] == "train" else {"benchmark": arguments[0]}
        return "ok", f"first line\nsecond line\n{json.dumps(result)}\n", ""

    monkeypatch.setattr(gpu_suite, "_run", process)
    return started


def test_a_part_that_fails_leaves_the_others(fake, tmp_path) -> None:
    result = run(tmp_path)
    found = {name: part["status"] for name, part in result["parts"].items()}
    assert found == {
        "train": "ok",
        "inference": "failed",
        "vit-step": "ok",
        "comoe": "timed out",
        "lmloss": "ok",
    }
    assert result["failed"] == ["inference", "comoe"]
    assert "CUDA error: out of memory" in result["parts"]["inference"]["error"]
    assert result["parts"]["train"]["result"] == TRAIN
    assert json.loads((tmp_path / gpu_suite.JSON_NAME).read_text()) == json.loads(
        json.dumps(result)
    )
    text = (tmp_path / gpu_suite.MARKDOWN_NAME).read_text()
    assert "| CoVFT | 1.040 | 30.00 | 26000 | 420 | 42.5% | 70.5 |" in text
    assert "| Full | out of memory: CUDA out of memory |" in text
    assert "| CoVFT / Full | step time | 1.040 | 1.04 | 1 |" in text
    assert "first line\nsecond line" in text and "CUDA error: out of memory" in text
    assert "cpu:" in text and "| comoe | timed out |" in text
    assert "| CoVFT / Full | step time |" in gpu_suite.table(result)


def test_time_is_shared_out_and_what_is_left_goes_on(fake, tmp_path) -> None:
    run(tmp_path, "--seconds", "400")
    limits = dict(fake)
    assert limits["train"] == pytest.approx(400 * 0.55 * 1.3, abs=2)
    # Nothing took any time: the last part has all of it, and no more.
    assert limits["lmloss"] == pytest.approx(400, abs=5)
    assert all(limit <= 400 for limit in limits.values())


def test_what_no_time_is_left_for_is_cut_and_said_so(fake, tmp_path) -> None:
    result = run(tmp_path, "--seconds", "20")
    statuses = [part["status"] for part in result["parts"].values()]
    assert statuses[:4] == ["cut"] * 4
    assert "s were left for it" in result["parts"]["train"]["error"]
    assert "| train | cut |" in (tmp_path / gpu_suite.MARKDOWN_NAME).read_text()


def test_results_are_written_after_each_part(fake, tmp_path, monkeypatch) -> None:
    def killed(*arguments: Any, **options: Any) -> Any:
        if fake:
            raise KeyboardInterrupt
        fake.append(("train", 0.0))
        return "ok", f"table\n{json.dumps(TRAIN)}\n", ""

    monkeypatch.setattr(gpu_suite, "_run", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    written = json.loads((tmp_path / gpu_suite.JSON_NAME).read_text())
    assert list(written["parts"]) == ["train"]
    assert "42.5%" in (tmp_path / gpu_suite.MARKDOWN_NAME).read_text()


def test_a_process_that_takes_too_long_is_ended() -> None:
    status, output, _ = gpu_suite._run(["comoe", "--rounds", "100000"], 0.3, dry_run=True)
    assert (status, output) == ("timed out", "")


@pytest.mark.parametrize(("ended", "status"), [("timed out", "cut"), ("failed", "failed")])
def test_finished_steps_of_an_unfinished_part_are_kept(
    ended, status, tmp_path, monkeypatch
) -> None:
    stated = {"settings": {}, "conditions": {}, "batch": {"samples": 4.0}}
    steps = {**TRAIN, **stated, "methods": {"Full": TRAIN["methods"]["Full"]}}

    def process(arguments: list[str], limit: float, *, dry_run: bool) -> tuple[str, str, str]:
        partial = Path(arguments[arguments.index("--partial") + 1])
        assert not partial.exists(), "an older suite's"
        partial.write_text(json.dumps(steps))
        return ended, "", "last words"

    monkeypatch.setattr(gpu_suite, "_run", process)
    (tmp_path / "train.partial.json").write_text("an older suite's")
    result = run(tmp_path, "--only", "train")
    part = result["parts"]["train"]
    assert part["status"] == status and part["result"] == steps
    assert ("last words" in part["error"]) == (status == "failed")
    assert result["failed"] == ([] if status == "cut" else ["train"])
    assert f"| train | {status} |" in (tmp_path / gpu_suite.MARKDOWN_NAME).read_text()
    assert not (tmp_path / "train.partial.json").exists()


SUITE = """
import signal, subprocess, sys
from pathlib import Path
from covft.perf import gpu_suite

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process ignores it
started = subprocess.Popen

def start(command, **options):
    process = started([sys.executable, "-c", "import time; time.sleep(60)"], **options)
    Path(sys.argv[1]).write_text(str(process.pid))
    return process

subprocess.Popen = start
with gpu_suite._ended_by_sigterm():
    gpu_suite._run(["comoe"], 60, dry_run=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_suite_ends_its_process(number, tmp_path) -> None:
    noted = tmp_path / "pid"
    suite = subprocess.Popen(
        [sys.executable, "-c", SUITE, str(noted)], stderr=subprocess.PIPE, cwd=CONFIG_ROOT.parent
    )
    wait_until(lambda: noted.exists() and noted.read_text() != "", seconds=120)
    suite.send_signal(number)
    suite.communicate(timeout=30)
    assert suite.returncode != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(noted.read_text()), 0)


def wait_until(done: Callable[[], bool], *, seconds: float) -> None:
    ends = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < ends, "it took too long"
        time.sleep(0.1)


def test_parts_that_fail_are_told_by_the_exit_status(tmp_path, monkeypatch, capsys) -> None:
    arguments = ["gpu-suite", "--malloc", "default", "--dry-run", "--only", "comoe", "--seconds"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments, "1", "--out", str(tmp_path)])
    tool = runpy.run_path(str(CONFIG_ROOT.parent / "tools/benchmark.py"), run_name="tool")
    with pytest.raises(SystemExit, match="failed or have no result: comoe"):
        tool["main"]()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["failed"] == ["comoe"]


def test_a_real_part_runs_in_its_own_process(tmp_path) -> None:
    result = run(tmp_path, "--only", "comoe")
    part = result["parts"]["comoe"]
    assert part["status"] == "ok", part
    assert part["result"]["benchmark"] == "comoe" and part["seconds"] > 0


def test_every_command_line_is_one_that_its_benchmark_takes() -> None:
    import importlib

    for part in gpu_suite.parts("llava15_7b_covft"):
        module = importlib.import_module(f"covft.perf.{part.name.replace('-', '_')}")
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        for arguments in (part.arguments(100.0), part.dry):
            assert arguments[0] == part.name
            parser.parse_args(arguments[1:])
            assert hasattr(parser.parse_args(arguments[1:]), "partial") == part.partial
    assert sum(part.share for part in gpu_suite.parts("x")) == pytest.approx(1)


def test_the_default_recipe_exists() -> None:
    parser = argparse.ArgumentParser()
    gpu_suite.add_arguments(parser)
    assert find_config(parser.get_default("recipe")).is_file()


def test_what_cannot_run_is_explained(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"--only vit: the parts are train, inference"):
        run(tmp_path, "--only", "vit")
    if not torch.cuda.is_available():
        parser = argparse.ArgumentParser()
        gpu_suite.add_arguments(parser)
        with pytest.raises(ValueError, match=r"no CUDA device is seen .* --dry-run"):
            gpu_suite.run(parser.parse_args([]))


def test_missing_packages_are_listed_at_once(tmp_path) -> None:
    # Stand-ins, of which two are broken: real ones would take seconds to import.
    sys_path = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, 'tools']; import benchmark"
    good = ("torch", "transformers", "cv2", "PIL", "safetensors", "huggingface_hub")
    for name in (*good, "filelock", "covft"):
        (tmp_path / f"{name}.py").touch()
    for name in ("mmengine", "rich", "orjson"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name} here')")
    done = subprocess.run(
        [sys.executable, "-c", f"{sys_path}; benchmark.check_packages()"],
        capture_output=True,
        text=True,
        cwd=CONFIG_ROOT.parent,
    )
    assert done.returncode == 1 and "mmengine: no mmengine here" in done.stderr
    assert "rich: no rich here" in done.stderr and "torch" not in done.stderr
    assert "orjson: no orjson here" in done.stderr
