import csv
import io
import json
import runpy
import sys
from pathlib import Path

import pytest

from covft.evaluation.benchmarks import TWELVE
from covft.evaluation.report import (
    PAPER_COLUMNS,
    csv_report,
    markdown_report,
    means,
    paper_row,
    read_reported,
)
from covft.registry import BENCHMARKS

TOOL = Path(__file__).parents[2] / "tools" / "report.py"
# CoVFT (CVPR 2026), Table 1: twelve scores, then G, K, V and Avg as printed.
TABLE_1 = """
7B_LLaVA-1.5 1510.7 64.30 58.30 62.00 66.80 55.21 58.20 27.33 56.21 67.45 54.98 63.25 65.04 60.07 53.84 59.13
7B_Freeze 1473.7 67.87 60.30 63.07 69.31 55.76 58.53 28.00 56.73 63.73 49.61 60.50 66.23 61.20 51.71 58.93
7B_Full 1510.2 67.44 59.88 63.92 67.67 56.51 59.70 27.33 55.82 65.71 51.97 60.00 66.69 61.29 52.17 59.29
7B_VPT 1452.1 67.10 58.16 63.17 67.92 56.08 57.29 24.67 56.21 65.09 51.34 58.67 65.26 60.43 51.20 58.19
7B_SVPT 1431.7 66.58 57.90 63.26 68.82 56.54 57.89 29.33 56.86 65.34 51.03 59.29 64.83 61.08 52.37 58.70
7B_LoRA 1494.5 67.44 57.56 63.98 67.63 55.76 59.18 28.66 55.82 64.22 53.71 59.83 65.93 60.86 52.45 59.04
7B_BitFit 1496.8 67.27 59.02 63.43 68.86 56.77 59.12 31.33 57.12 65.34 51.03 60.67 66.14 61.58 53.10 59.57
7B_CoVFT 1525.2 68.13 60.40 63.37 69.51 56.64 59.64 36.67 57.52 66.96 56.08 61.83 67.04 61.93 55.81 61.08
13B_LLaVA-1.5 1531.3 67.70 63.60 63.30 71.60 59.16 63.10 30.67 55.29 66.82 47.95 63.00 67.79 64.62 52.75 60.73
13B_Freeze 1557.6 69.93 63.57 63.73 72.43 60.20 60.18 34.00 55.94 65.09 51.34 62.83 68.78 64.27 53.84 61.43
13B_Full 1555.4 68.56 63.49 64.83 71.99 59.94 61.36 34.00 55.82 64.22 50.39 63.25 68.66 64.43 53.54 61.30
13B_BitFit 1532.8 70.02 62.54 63.98 72.14 59.52 61.04 38.00 54.64 63.22 47.87 66.50 68.55 64.23 54.05 61.43
13B_CoVFT 1590.6 70.45 64.52 63.84 72.90 60.65 61.79 38.67 58.04 65.22 51.34 67.58 69.66 65.11 56.17 62.90
"""  # noqa: E501
ROWS = {
    name: [float(cell) for cell in cells]
    for name, *cells in map(str.split, TABLE_1.strip().splitlines())
}
#: Printed means that don't follow from their own row (their difference is no rounding), and what
#: does. The others agree within 0.01.
MISPRINTED = {
    ("7B_LLaVA-1.5", "G"): 65.03375,
    ("13B_BitFit", "G"): 68.295,
    ("13B_BitFit", "Avg"): 61.3425,
    ("13B_CoVFT", "G"): 69.585,
    ("13B_CoVFT", "Avg"): 62.8775,
}


def scores_of(cells: list[float]) -> dict[str, float]:
    names = [column.benchmark for column in PAPER_COLUMNS]
    return dict(zip(names, cells, strict=True))


def results_of(cells: list[float], **changes: object) -> dict:
    entries = {
        column.benchmark: {
            "title": column.title,
            "metric": "score",
            "max_score": column.max_score,
            "metrics": {"score": cell},
            "num_items": 10,
            "num_official": 10,
            "limit": None,
            "num_unreadable": 0,
            **changes,
        }
        for column, cell in zip(PAPER_COLUMNS, cells, strict=True)
    }
    return {"benchmarks": entries}


@pytest.mark.parametrize("name", ROWS)
def test_means_are_those_of_table_1(name: str) -> None:
    printed = dict(zip(("G", "K", "V", "Avg"), ROWS[name][12:], strict=True))
    found = means(scores_of(ROWS[name][:12]))
    for key, value in printed.items():
        assert found[key] == pytest.approx(MISPRINTED.get((name, key), value), abs=0.01), key


def test_columns_are_the_benchmarks_own(tmp_path: Path) -> None:
    assert [column.benchmark for column in PAPER_COLUMNS] == list(TWELVE)
    for column in PAPER_COLUMNS:
        benchmark = BENCHMARKS.build({**TWELVE[column.benchmark], "root": str(tmp_path)})
        assert (benchmark.name, benchmark.title) == (column.benchmark, column.title)
        assert benchmark.max_score == column.max_score


def test_a_missing_benchmark_leaves_its_means_empty() -> None:
    found = scores_of(ROWS["7B_CoVFT"][:12])
    del found["ai2d"]
    row = paper_row(found)
    assert (row["AI2D"], row["K"], row["Avg"]) == (None, None, None)
    assert row["G"] == pytest.approx(67.04, abs=0.01)
    assert row["V"] == pytest.approx(55.81, abs=0.01)


def test_markdown_has_the_papers_columns_and_says_what_is_partial() -> None:
    rows = {
        "covft": results_of(ROWS["7B_CoVFT"][:12]),
        "fr|eze": results_of(ROWS["7B_Freeze"][:12], limit=5),
    }
    rows["covft"]["benchmarks"]["easy_vqa"] = {
        **rows["covft"]["benchmarks"]["gqa"],
        "title": "easy-VQA",
        "metrics": {"score": 85.8},
        "num_unreadable": 2,
    }
    header, _, covft, freeze, _, extra, _, with_extra, without, _, *notes = markdown_report(
        rows
    ).splitlines()
    assert header == (
        "| run | MME-P | MMB-en | MMB-cn | GQA | SQA-I | AI2D | TextVQA | MMVP | RWQA | COCO | ADE "
        "| Omni3D | G | K | V | Avg |"
    )
    assert covft.startswith("| covft | 1525.2 | 68.13 |")
    assert covft.endswith("| 67.04 | 61.93 | 55.81 | 61.08 |")
    assert freeze.startswith("| fr\\|eze | 1473.7 |")
    assert extra == "| run | easy-VQA |"
    assert (with_extra, without) == ("| covft | 85.80 |", "| fr\\|eze | - |")
    assert "* covft, easy_vqa: 2 items couldn't be asked." in notes
    assert "* fr\\|eze, mme: only the first 5." in notes
    assert len(notes) == 13


def test_csv_keeps_full_precision() -> None:
    cells = [value + 1 / 3 for value in ROWS["7B_CoVFT"][:12]]
    rows = list(csv.DictReader(io.StringIO(csv_report({"a, b": results_of(cells)}))))
    assert rows[0]["run"] == "a, b"
    assert float(rows[0]["MME-P"]) == cells[0]
    assert float(rows[0]["Avg"]) == means(scores_of(cells))["Avg"]
    assert rows[0]["partial"] == ""


def test_csv_says_what_is_partial() -> None:
    results = results_of(ROWS["7B_CoVFT"][:12])
    for name, changes in (
        ("gqa", {"limit": 5}),
        ("ai2d", {"num_items": 9}),
        ("mmvp", {"num_unreadable": 1}),
    ):
        results["benchmarks"][name] |= changes
    (row,) = csv.DictReader(io.StringIO(csv_report({"a": results})))
    assert row["partial"] == "gqa ai2d mmvp"


def test_results_of_one_folder_have_different_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = json.dumps(results_of(ROWS["7B_CoVFT"][:12]))
    files = [tmp_path / name for name in ("results.json", "results_limit3.json")]
    for file in files:
        file.write_text(text)
    names = [tmp_path.name, f"{tmp_path.name}/results_limit3"]
    assert [read_reported(file)[0] for file in files] == names
    monkeypatch.setattr(sys, "argv", ["report.py", "table", *map(str, files)])
    runpy.run_path(str(TOOL), run_name="__main__")
    assert f"| {names[1]} |" in capsys.readouterr().out
    for command in (["compare"], ["gallery", "--out", str(tmp_path)]):
        twice = [command[0], str(files[0]), str(files[0]), *command[1:]]
        monkeypatch.setattr(sys, "argv", ["report.py", *twice])
        with pytest.raises(SystemExit, match="two of the runs have one name"):
            runpy.run_path(str(TOOL), run_name="__main__")


def test_reading_results(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"results\.json not found; score the run first"):
        read_reported(tmp_path)
    (tmp_path / "results.json").write_text('{"benchmarks": {"mme": {}}}')
    with pytest.raises(ValueError, match=r"holds no results of tools/test\.py"):
        read_reported(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(results_of(ROWS["7B_Full"][:12])))
    name, results = read_reported(tmp_path)
    assert name == tmp_path.name
    assert paper_row({"gqa": 1.0})["GQA"] == 1.0
    assert len(results["benchmarks"]) == 12
