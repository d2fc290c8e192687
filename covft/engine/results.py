"""The evaluation at the end of a run: ``results.json`` and the lines that are printed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from torch import nn

from covft.checkpoints.atomic import atomic_write_text
from covft.checkpoints.run import Run
from covft.config import stage_configs
from covft.evaluation import Benchmark, evaluate, weights_fingerprint
from covft.models.vision.feature_cache import DEFAULT_MAX_BYTES
from covft.registry import BENCHMARKS, nearest

RESULTS_NAME = "results.json"
_KEYS = {"benchmark", "blind", "batch_size", "feature_cache_bytes", "compare_with"}


def check_evaluation(cfg: Mapping[str, Any]) -> Benchmark:
    """Return the benchmark that a config's ``evaluation`` asks for.

    Raises:
        ValueError: If it has an unknown key, no benchmark, or one that can't be built.
    """
    for key in cfg:
        if key not in _KEYS:
            raise ValueError(f"evaluation.{key} is unknown; {nearest(key, _KEYS)}")
    if "benchmark" not in cfg:
        raise ValueError("the config has no evaluation.benchmark")
    benchmark: Benchmark = BENCHMARKS.build(cfg["benchmark"])
    return benchmark


def evaluate_run(
    run: Run,
    work_dir: Path,
    *,
    train_seconds: float | None = None,
    total_started: float | None = None,
    tag: str = "",
) -> dict[str, Any]:
    """Score a run as its config's ``evaluation`` asks, write ``results.json`` and print it.

    ``evaluation`` holds ``benchmark`` (a benchmark's config), ``blind`` (whether to score grey
    images too), ``batch_size`` and ``feature_cache_bytes`` (see :func:`covft.evaluation.evaluate`),
    and ``compare_with``: names of runs beside this one whose measured results are printed with it
    if they are there.

    Args:
        run: The run, loaded.
        work_dir: Its folder.
        train_seconds: How long its stages took; by default what an earlier evaluation wrote.
        total_started: ``time.perf_counter()`` at the run's start, put back by what earlier,
            interrupted calls took.
        tag: Put behind ``results`` and the names of the predictions' files: an evaluation with
            other options doesn't replace the run's own.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: If ``evaluation`` has an unknown key or no benchmark.
    """
    cfg = run.config.get("evaluation") or {}
    benchmark = check_evaluation(cfg)
    earlier = read_results(work_dir) or {}
    results: dict[str, Any] = {
        **_scores(run, work_dir, cfg, benchmark, tag),
        "train_seconds": earlier.get("train_seconds") if train_seconds is None else train_seconds,
        "total_seconds": earlier.get("total_seconds"),
        "num_threads": torch.get_num_threads(),
        "weights_source": run.model.weights_sources(),
        "trainable_parameters": trainable_parameters(run.model),
    }
    if total_started is not None:
        results["total_seconds"] = time.perf_counter() - total_started
    path = work_dir.resolve() / RESULTS_NAME
    if tag:
        path = path.with_name(f"{path.stem}{tag}{path.suffix}")
    atomic_write_text(path, json.dumps(results, indent=2) + "\n")
    rows = {path.parent.name: results}
    for name in cfg.get("compare_with") or []:
        other = read_results(path.parent.parent / name)
        if other is not None and name not in rows:
            rows[name] = other
    print_log("\n" + comparison_table(rows), logger="current")
    return results


def trainable_parameters(model: nn.Module) -> dict[str, int]:
    """Return how many trainable parameters each part of a model has."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        counts[part] = counts.get(part, 0) + parameter.numel() * parameter.requires_grad
    return counts


def read_results(work_dir: Path) -> dict[str, Any] | None:
    """Return a run's results, or None if it has none."""
    path = work_dir / RESULTS_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def comparison_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the measured results of runs, by name, as a table."""
    lines = [f"{'run':<24}{'accuracy':>10}{'blind':>10}{'questions':>11}{'train time':>12}"]
    for name, found in rows.items():
        blind, seconds = found["blind_accuracy"], found["train_seconds"]
        lines.append(
            f"{name:<24}{found['accuracy']:>10.1%}"
            f"{'-' if blind is None else format(blind, '.1%'):>10}{found['num_questions']:>11}"
            f"{'-' if seconds is None else format(seconds, '.0f') + ' s':>12}"
        )
    return "\n".join(lines)


def _scores(
    run: Run, work_dir: Path, cfg: Mapping[str, Any], benchmark: Benchmark, tag: str
) -> dict[str, Any]:
    sources = run.model.weights_sources()
    model_text = repr(stage_configs(run.config)[-1][1].model.to_dict())
    weights_id = json.dumps([weights_fingerprint(run.weights), sources, model_text])
    scores = {}
    for blank in (False, True) if cfg.get("blind") else (False,):
        scores[blank] = evaluate(
            run.model,
            run.spec,
            benchmark,
            work_dir,
            weights_id=weights_id,
            batch_size=cfg.get("batch_size", 32),
            feature_cache_bytes=cfg.get("feature_cache_bytes", DEFAULT_MAX_BYTES),
            blank_images=blank,
            resize=run.resize,
            tag=tag,
        )
    seen = scores[False]
    return {
        "benchmark": benchmark.name,
        **seen.metrics,
        "blind_accuracy": scores[True].metrics["accuracy"] if True in scores else None,
        "num_questions": seen.num_items,
        "num_unreadable": len(seen.unreadable),
    }
