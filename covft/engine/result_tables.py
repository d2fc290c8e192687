"""Results of several runs side by side, as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Results = Mapping[str, Any]


def comparison_table(rows: Mapping[str, Results]) -> str:
    """Return the measured results of runs, by name, as a table."""
    headers, cells = score_cells(rows)
    wide = [max(len(header) + 2, 10) for header in headers]
    lines = [f"{'run':<24}{_right(headers, wide)}{'questions':>11}{'train time':>12}"]
    for name, found in rows.items():
        lines.append(
            f"{name:<24}{_right(cells[name], wide)}{num_questions(found):>11}"
            f"{train_time(found):>12}"
        )
    return "\n".join(lines)


def score_cells(rows: Mapping[str, Results]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the columns of benchmarks' scores: their headers, and each row's cells.

    Where all rows are about one benchmark, the column is called after its metric. Benchmarks that
    were asked about grey images, too, have a second column.
    """
    entries = {
        name: entry for found in rows.values() for name, entry in found["benchmarks"].items()
    }
    headers: list[str] = []
    cells: dict[str, list[str]] = {name: [] for name in rows}
    for benchmark, entry in entries.items():
        header = entry["metric"] if len(entries) == 1 else entry["title"]
        for kind, label in (("metrics", header), ("blind_metrics", f"blind {header}")):
            found = {row: _score(results, benchmark, kind) for row, results in rows.items()}
            if kind == "metrics" or any(score is not None for score in found.values()):
                headers.append(label.replace("_", " "))
                for row, score in found.items():
                    cells[row].append(_cell(score, entry["max_score"]))
    return headers, cells


def first_score(found: Results) -> float:
    """Return the score of a run's first benchmark, which tables are sorted by."""
    entry = next(iter(found["benchmarks"].values()))
    return float(entry["metrics"][entry["metric"]])


def num_questions(found: Results) -> int:
    """Return how many questions a run was scored with."""
    return sum(entry["num_items"] for entry in found["benchmarks"].values())


def train_time(found: Results) -> str:
    """Return how long a run was trained, as a cell."""
    seconds = found.get("train_seconds")
    return "-" if seconds is None else f"{seconds:.0f} s"


def _score(found: Results, benchmark: str, kind: str) -> float | None:
    entry = found["benchmarks"].get(benchmark) or {}
    metrics = entry.get(kind) or {}
    return metrics.get(entry.get("metric"))


def _cell(score: float | None, max_score: float) -> str:
    if score is None:
        return "-"
    return f"{score:.1f}%" if max_score == 100 else f"{score:.1f}"


def _right(cells: list[str], widths: list[int]) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
