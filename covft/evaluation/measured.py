"""What runs were measured with, opened again: benchmarks, answers and their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from covft.evaluation.benchmark import Benchmark
from covft.evaluation.gallery import Answers, write_gallery
from covft.evaluation.predictions import abridged, read_fingerprint, read_predictions
from covft.evaluation.report import read_reported
from covft.evaluation.significance import Comparison, compare_scores
from covft.registry import BENCHMARKS, nearest


@dataclass(frozen=True)
class Measured:
    """A run's answers to one benchmark.

    Attributes:
        benchmark: The benchmark, built from the config that the results hold.
        answers: The answers and their scores.
    """

    benchmark: Benchmark
    answers: Answers


def open_measured(path: Path, name: str) -> Measured:
    """Open what a run answered to a benchmark.

    Args:
        path: The run's folder, or a file of results.
        name: The benchmark's name.

    Raises:
        ValueError: If the run has no results of it, its files are missing, answers are, or the
            answers aren't those that were scored.
    """
    run, results = read_reported(path)
    entries: Mapping[str, Any] = results["benchmarks"]
    if name not in entries:
        raise ValueError(f"{path}: no results of '{name}'; {nearest(name, entries)}")
    benchmark: Benchmark = BENCHMARKS.build(dict(entries[name]["config"]))
    folder = path if path.is_dir() else path.parent
    file = folder / entries[name]["predictions"]
    predictions = read_predictions(file)
    _check_scored(file, entries[name].get("fingerprint"))
    benchmark.check_complete(predictions)
    return Measured(benchmark, Answers(run, predictions, benchmark.item_scores(predictions)))


def _check_scored(file: Path, scored: Mapping[str, str] | None) -> None:
    """Refuse answers of another model, or in another precision, than those that were scored."""
    again = "score it again: tools/test.py RUN --phase score"
    if scored is None:
        raise ValueError(f"the results don't say whose answers {file} held; {again}")
    found = abridged(read_fingerprint(file))
    keys = [key for key in {**scored, **found} if scored.get(key) != found.get(key)]
    if keys:
        lines = [f"{key}: {found.get(key)} in the file, {scored.get(key)} scored" for key in keys]
        raise ValueError("\n".join([f"{file} isn't what was scored; {again}", *lines]))


def common_benchmarks(runs: Sequence[Path], wanted: Sequence[str] | None) -> list[str]:
    """Return the benchmarks that all runs have results of, or check those that are wanted.

    Raises:
        ValueError: If there are none.
    """
    if wanted:
        return list(wanted)
    results = [read_reported(run)[1]["benchmarks"] for run in runs]
    common = [name for name in results[0] if all(name in other for other in results[1:])]
    if not common:
        raise ValueError("the runs have no benchmark in common; score them with the same ones")
    return common


def compare_runs(
    runs: Sequence[Path], *, benchmarks: Sequence[str] | None = None, num_draws: int = 10_000
) -> str:
    """Return how each run differs from the first, as a Markdown table.

    Args:
        runs: Folders of runs or files of results, at least two.
        benchmarks: Names of benchmarks; by default those that all runs have results of.
        num_draws: Draws of the bootstrap, see :func:`compare_scores`.

    Raises:
        ValueError: If there are fewer than two runs, or they answered different questions.
    """
    if len(runs) < 2:
        raise ValueError(f"a comparison needs at least two runs, got {len(runs)}")
    lines = [
        "| benchmark | run | score | difference | 95 % interval | p | better / worse / units |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in common_benchmarks(runs, benchmarks):
        first = open_measured(runs[0], name)
        base = first.benchmark.score(first.answers.predictions)[first.benchmark.metric]
        lines.append(
            f"| {first.benchmark.title} | {first.answers.run} | {base:.2f} | | | "
            f"| {len(first.answers.scores)} |"
        )
        for path in runs[1:]:
            other = open_measured(path, name)
            score = other.benchmark.score(other.answers.predictions)[other.benchmark.metric]
            found = compare_scores(
                first.answers.scores,
                other.answers.scores,
                strata=other.benchmark.strata(),
                max_score=other.benchmark.max_score,
                num_draws=num_draws,
            )
            lines.append(_compared(other, score, found))
    tests = len(lines) - 2 - len(common_benchmarks(runs, benchmarks))
    return "\n".join(
        [
            *lines,
            "",
            f"Paired bootstrap over questions, {num_draws} draws; {tests} tests, p not corrected "
            "for their number. It tells of the choice of questions, not of the training's seed.",
        ]
    )


def _compared(other: Measured, score: float, found: Comparison) -> str:
    return (
        f"| {other.benchmark.title} | {other.answers.run} | {score:.2f} | {found.difference:+.2f} "
        f"| {found.low:+.2f} … {found.high:+.2f} | {found.p_value:.4f} "
        f"| {found.num_better} / {found.num_worse} / {found.num_units} |"
    )


def gallery_of(
    runs: Sequence[Path],
    folder: Path,
    *,
    benchmarks: Sequence[str] | None = None,
    max_units: int = 100,
) -> list[str]:
    """Write a page per benchmark, see :func:`write_gallery`; return a line about each."""
    lines = []
    for name in common_benchmarks(runs, benchmarks):
        opened = [open_measured(run, name) for run in runs]
        path = folder / f"{name}.html"
        folder.mkdir(parents=True, exist_ok=True)
        shown = write_gallery(
            path, opened[0].benchmark, [one.answers for one in opened], max_units=max_units
        )
        lines.append(f"{path}: {shown} questions")
    return lines


def export_run(run: Path, folder: Path, *, benchmarks: Sequence[str] | None = None) -> list[Path]:
    """Write a run's answers in the official formats, a folder per benchmark that has one.

    Raises:
        ValueError: If a benchmark that was named has no such format, or no results.
    """
    written = []
    for name in common_benchmarks([run], benchmarks):
        opened = open_measured(run, name)
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        files = opened.benchmark.export(opened.answers.predictions, target)
        if not files:
            target.rmdir()
            if benchmarks:
                raise ValueError(f"{name} has no official format of answers")
        written += files
    return written
