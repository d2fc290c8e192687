"""Results of runs as CoVFT's tables print them: twelve benchmarks, group means, and their average.

"MME is divided by 20 to have the same scale as the others before averaging" (CoVFT, supplementary,
footnote 1, after Tong et al., Cambrian-1, NeurIPS 2024).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Results = Mapping[str, Any]
RESULTS_NAME = "results.json"


@dataclass(frozen=True)
class Column:
    """A benchmark's column.

    Attributes:
        benchmark: The benchmark's name in ``results.json``.
        title: Its heading.
        group: Which mean it enters: General, Knowledge & OCR, or Vision-centric.
        max_score: What its score is a share of.
    """

    benchmark: str
    title: str
    group: str
    max_score: float = 100.0


#: CoVFT's Table 1, in its order.
PAPER_COLUMNS = (
    Column("mme", "MME-P", "G", max_score=2000.0),
    Column("mmbench_en", "MMB-en", "G"),
    Column("mmbench_cn", "MMB-cn", "G"),
    Column("gqa", "GQA", "G"),
    Column("science_qa", "SQA-I", "K"),
    Column("ai2d", "AI2D", "K"),
    Column("text_vqa", "TextVQA", "K"),
    Column("mmvp", "MMVP", "V"),
    Column("real_world_qa", "RWQA", "V"),
    Column("cvbench_coco", "COCO", "V"),
    Column("cvbench_ade", "ADE", "V"),
    Column("cvbench_omni3d", "Omni3D", "V"),
)
GROUPS = ("G", "K", "V")
AVERAGE = "Avg"


def scores(results: Results) -> dict[str, float]:
    """Return each benchmark's score by name, in its own unit."""
    return {
        name: float(entry["metrics"][entry["metric"]])
        for name, entry in results["benchmarks"].items()
    }


def means(found: Mapping[str, float]) -> dict[str, float | None]:
    """Return the group means and the average of the twelve, in percent.

    Args:
        found: Scores by the benchmark's name, in their own units.

    Returns:
        ``G``, ``K``, ``V`` and ``Avg``, the mean of the twelve scores and not of the groups. None
        where a score is missing: a mean of fewer benchmarks can't be compared.
    """
    by_group = {
        group: [column for column in PAPER_COLUMNS if column.group == group] for group in GROUPS
    }
    return {
        name: _mean(found, columns)
        for name, columns in {**by_group, AVERAGE: list(PAPER_COLUMNS)}.items()
    }


def _mean(found: Mapping[str, float], columns: Sequence[Column]) -> float | None:
    if any(column.benchmark not in found for column in columns):
        return None
    return sum(100 * found[c.benchmark] / c.max_score for c in columns) / len(columns)


def paper_row(found: Mapping[str, float]) -> dict[str, float | None]:
    """Return the cells of a row of CoVFT's Table 1, by heading, means included."""
    cells: dict[str, float | None] = {c.title: found.get(c.benchmark) for c in PAPER_COLUMNS}
    return {**cells, **means(found)}


def markdown_report(rows: Mapping[str, Results]) -> str:
    """Return the results of runs, by name, as Markdown.

    The twelve benchmarks come in the paper's order with their means, further ones in a second
    table; notes say which results aren't of a whole benchmark.
    """
    found = {name: scores(results) for name, results in rows.items()}
    parts = []
    if _has_paper_columns(found):
        parts.append(_markdown({name: _formatted(paper_row(s)) for name, s in found.items()}))
    others = _other_columns(rows)
    if others:
        extra = {
            name: {title: _cell(s.get(key), scale) for key, (title, scale) in others.items()}
            for name, s in found.items()
        }
        parts.append(_markdown(extra))
    return "\n\n".join([*parts, *_notes(rows)])


def csv_report(rows: Mapping[str, Results]) -> str:
    """Return the results of runs, by name, as CSV in full precision; empty where one is missing.

    The column ``partial`` names the benchmarks whose result isn't of a whole one, with spaces
    between: only the first items, another number than the official one, or some couldn't be asked.
    """
    found = {name: scores(results) for name, results in rows.items()}
    others = _other_columns(rows)
    stream = io.StringIO()
    headings = [*paper_row({}), *(title for title, _ in others.values()), "partial"]
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["run", *headings])
    for name, own in found.items():
        cells = [*paper_row(own).values(), *(own.get(key) for key in others)]
        texts = ("" if cell is None else repr(cell) for cell in cells)
        writer.writerow([name, *texts, " ".join(_partial(rows[name]))])
    return stream.getvalue()


def read_reported(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the name and the results of a run.

    The name is the folder's; a file that isn't ``results.json`` adds its own, without the ending.

    Args:
        path: The run's folder, or a file that ``tools/test.py`` wrote.

    Raises:
        ValueError: If there are none, or the file is no such file.
    """
    file = path / RESULTS_NAME if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} not found; score the run first: tools/test.py")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        scores(results)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} holds no results of tools/test.py ({error!r})") from error
    name = file.resolve().parent.name
    return name if file.name == RESULTS_NAME else f"{name}/{file.stem}", results


def check_names(names: Sequence[str]) -> None:
    """Raise a ValueError if two runs have one name."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(
            f"two of the runs have one name, '{twice}'; rename a folder to tell them apart"
        )


def _has_paper_columns(found: Mapping[str, Mapping[str, float]]) -> bool:
    return any(column.benchmark in own for own in found.values() for column in PAPER_COLUMNS)


def _other_columns(rows: Mapping[str, Results]) -> dict[str, tuple[str, float]]:
    """Return title and scale of the benchmarks beside the twelve, by name."""
    known = {column.benchmark for column in PAPER_COLUMNS}
    return {
        name: (entry["title"], entry["max_score"])
        for results in rows.values()
        for name, entry in results["benchmarks"].items()
        if name not in known
    }


def _formatted(row: Mapping[str, float | None]) -> dict[str, str]:
    scales = {column.title: column.max_score for column in PAPER_COLUMNS}
    return {title: _cell(value, scales.get(title, 100.0)) for title, value in row.items()}


def _cell(value: float | None, max_score: float) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if max_score <= 100 else f"{value:.1f}"


def _markdown(rows: Mapping[str, Mapping[str, str]]) -> str:
    headings = list(next(iter(rows.values())))
    lines = [["run", *headings], ["---", *["---:"] * len(headings)]]
    lines += [[_escaped(name), *row.values()] for name, row in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _escaped(name: str) -> str:
    return name.replace("|", "\\|")


def _partial(results: Results) -> list[str]:
    return [name for name, entry in results["benchmarks"].items() if _missing(entry)]


def _missing(entry: Mapping[str, Any]) -> list[str]:
    """Return what keeps a result from being a whole benchmark's."""
    said = []
    if entry.get("limit") is not None:
        said.append(f"only the first {entry['limit']}")
    elif entry.get("num_official") not in (None, entry["num_items"]):
        said.append(f"{entry['num_items']} items of officially {entry['num_official']}")
    if entry.get("num_unreadable"):
        said.append(f"{entry['num_unreadable']} items couldn't be asked")
    return said


def _notes(rows: Mapping[str, Results]) -> list[str]:
    notes = []
    for name, results in rows.items():
        for benchmark, entry in results["benchmarks"].items():
            said = _missing(entry)
            said += [f"{key} {value}" for key, value in (entry.get("notes") or {}).items()]
            if said:
                notes.append(f"{_escaped(name)}, {benchmark}: {'; '.join(said)}.")
    return ["\n".join(f"* {note}" for note in notes)] if notes else []
