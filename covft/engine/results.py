"""The evaluation at the end of a run: ``results.json`` and the lines that are printed."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from mmengine.logging import print_log
from torch import nn

from covft.atomic import atomic_write_text, set_aside
from covft.checkpoints.run import Run
from covft.engine.evaluation import (
    Options,
    ScoringError,
    complaints,
    provenance,
    run_benchmarks,
)
from covft.engine.result_tables import comparison_table
from covft.engine.subject import Subject
from covft.evaluation.benchmarks import TWELVE
from covft.evaluation.chosen import Chosen, chosen_benchmarks
from covft.evaluation.evaluate import Effort
from covft.evaluation.report import RESULTS_NAME, markdown_report
from covft.models.vision.feature_cache import DEFAULT_MAX_BYTES

#: What the benchmarks in one file have in common, of their answers' fingerprints.
_SHARED = ("weights", "model", "precision")


def check_evaluation(cfg: Mapping[str, Any]) -> list[Chosen]:
    """Return the benchmarks that a config's ``evaluation`` asks for.

    Raises:
        ValueError: If it has an unknown key, no benchmark, or one that can't be built.
    """
    return chosen_benchmarks(cfg)


def evaluate_run(
    run: Run,
    work_dir: Path,
    *,
    train_seconds: float | None = None,
    total_started: float | None = None,
) -> dict[str, Any]:
    """Score a run as its config's ``evaluation`` asks, write ``results.json`` and print it.

    ``evaluation`` holds ``benchmark`` or ``benchmarks`` (a benchmark's config, or a list of them),
    ``data_root`` (the folder that holds theirs), ``blind`` (whether to score grey images too),
    ``batch_size`` and ``feature_cache_bytes`` (see :mod:`covft.evaluation.evaluate`), ``precision``
    ("fp32", "bf16" or "fp16"; by default weights stay as they were loaded), and ``compare_with``:
    names of runs beside this one whose measured results are printed with it if they are there.

    Args:
        run: The run, loaded.
        work_dir: Its folder.
        train_seconds: How long its stages took; by default what an earlier evaluation wrote.
        total_started: ``time.perf_counter()`` at the run's start, put back by what earlier,
            interrupted calls took.

    Returns:
        What ``results.json`` holds.

    Raises:
        ScoringError: At the end, if answers to some benchmarks couldn't be scored.
        ValueError: If ``evaluation`` has an unknown key or no benchmark.
    """
    cfg = run.config.get("evaluation") or {}
    subject = Subject(work_dir.resolve().name, run.config, run.weights, lambda: run)
    path = work_dir / RESULTS_NAME
    failure: ScoringError | None = None
    try:
        evaluate_subject(subject, check_evaluation(cfg), path, evaluation_options(cfg))
    except ScoringError as error:
        if not path.is_file():
            raise
        failure = error

    def timed(results: dict[str, Any]) -> None:
        if train_seconds is not None:
            results["train_seconds"] = train_seconds
        if total_started is not None:
            results["total_seconds"] = time.perf_counter() - total_started

    results = _update(path, timed)
    print_results(path, compare_with=cfg.get("compare_with") or [])
    if failure is not None:
        raise failure
    return results


def evaluation_options(cfg: Mapping[str, Any]) -> Options:
    """Return how a config's ``evaluation`` wants benchmarks to be run."""
    return Options(
        batch_size=cfg.get("batch_size", 32),
        precision=cfg.get("precision"),
        feature_cache_bytes=cfg.get("feature_cache_bytes", DEFAULT_MAX_BYTES),
        blind=bool(cfg.get("blind")),
    )


def evaluate_subject(
    subject: Subject,
    chosen: Sequence[Chosen],
    path: Path,
    options: Options,
) -> dict[str, Any] | None:
    """Run benchmarks, and put each one's result into a file as soon as it is there.

    What the file holds of other benchmarks, also what another process writes meanwhile, is kept if
    it was measured with the same weights, model and precision; the file is renamed to ``*.old1``
    and so on if not.

    Args:
        subject: What is evaluated.
        chosen: The benchmarks.
        path: The file; answers are kept beside it, in ``predictions/``.
        options: How.

    Returns:
        What the file holds; None if nothing was scored here.

    Raises:
        ValueError: As :func:`covft.engine.evaluation.run_benchmarks`.
    """
    results: dict[str, Any] | None = None
    scored: dict[str, Any] = {}
    try:
        for name, entry, effort in run_benchmarks(subject, chosen, path.parent, options):
            facts: dict[str, Any] = {"provenance": provenance(subject, path.parent)}
            if options.phase != "score":
                facts["num_threads"] = torch.get_num_threads()
                facts["weights_source"] = subject.run.model.weights_sources()
                facts["trainable_parameters"] = trainable_parameters(subject.run.model)
            results = _put(path, name, entry, effort, facts)
            scored[name] = results["benchmarks"][name]
    finally:
        for line in complaints(scored):
            print_log(line, logger="current", level=logging.WARNING)
    return results


def trainable_parameters(model: nn.Module) -> dict[str, int]:
    """Return how many trainable parameters each part of a model has."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        counts[part] = counts.get(part, 0) + parameter.numel() * parameter.requires_grad
    return counts


def print_results(path: Path, *, compare_with: Sequence[str] = ()) -> None:
    """Print a file of results as a table, with those of runs beside it that have any.

    Those of several benchmarks, or of one of the paper's, are written to a Markdown file beside it,
    too: a row in the order of the paper's table.

    Args:
        path: The file, in its run's folder.
        compare_with: Names of folders beside that one.
    """
    path = path.resolve()
    rows = {path.parent.name: _read(path)}
    for name in compare_with:
        rows.setdefault(name, read_results(path.parent.parent / name))
    measured = {name: found for name, found in rows.items() if found is not None}
    benchmarks = {name for found in measured.values() for name in found["benchmarks"]}
    if len(benchmarks) == 1 and not benchmarks & TWELVE.keys():
        print_log("\n" + comparison_table(measured), logger="current")
        return
    table = markdown_report(measured)
    atomic_write_text(path.with_suffix(".md"), table + "\n")
    print_log("\n" + table, logger="current")


def read_results(work_dir: Path) -> dict[str, Any] | None:
    """Return a run's results, or None if it has none that this version can read."""
    return _read(work_dir / RESULTS_NAME)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    results = json.loads(path.read_text(encoding="utf-8"))
    return results if "benchmarks" in results else None


def _write(path: Path, results: Mapping[str, Any]) -> None:
    atomic_write_text(path, json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def _update(path: Path, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Change what a file of results holds now: another process may have written since."""
    with FileLock(path.with_name(f".{path.name}.lock")):
        empty: dict[str, Any] = {"benchmarks": {}, "train_seconds": None, "total_seconds": None}
        results = {**empty, **(_read(path) or {})}
        change(results)
        _write(path, results)
    return results


def _put(
    path: Path, name: str, entry: dict[str, Any], effort: Effort, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Put a benchmark's result into a file; what doesn't go with it is set aside."""

    def change(results: dict[str, Any]) -> None:
        weights = facts["provenance"]["weights"]
        held = results.get("provenance")
        other_weights = held is not None and held["weights"] != weights
        differing = ["weights"] if other_weights else _differing(results, entry)
        if differing:
            _set_aside(path, differing)
            results["benchmarks"] = {}
        if other_weights:
            results.update(train_seconds=None, total_seconds=None)
        earlier = results["benchmarks"].get(name) or {}
        entry["seconds"] = _total_seconds(earlier, entry, effort)
        results["benchmarks"][name] = entry
        results.update(facts)

    return _update(path, change)


def _differing(results: Mapping[str, Any], entry: Mapping[str, Any]) -> list[str]:
    """Return in what a file's entries differ from one that is put beside them."""
    found = [held.get("fingerprint") or {} for held in results["benchmarks"].values()]
    new = entry["fingerprint"]
    return [key for key in _SHARED if any(held.get(key) != new.get(key) for held in found)]


def _total_seconds(
    earlier: Mapping[str, Any], entry: Mapping[str, Any], effort: Effort
) -> float | None:
    """Return how long all answers took; None if a call that was killed gave some of them."""
    if not effort.kept and effort.seconds:
        return effort.seconds
    held = earlier.get("seconds") if earlier.get("fingerprint") == entry["fingerprint"] else None
    return None if held is None else held + effort.seconds


def _set_aside(path: Path, differing: Sequence[str]) -> None:
    ((_, old),) = set_aside([path])
    print_log(
        f"{path} holds results of other {' and '.join(differing)}; renamed to {old.name}",
        logger="current",
        level=logging.WARNING,
    )
