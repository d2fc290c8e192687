"""tools/test.py on miniatures of all official files: the twelve, and the downstream ones."""

import importlib
import json
import runpy
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from official_files import write_choice_benchmarks
from official_files_open import write_open_benchmarks
from untrained_run import untrained_run

from covft.evaluation.benchmarks import DOWNSTREAM, TWELVE

#: The package's attribute of that name is the function.
evaluate = importlib.import_module("covft.evaluation.evaluate")
TOOL = Path(__file__).parents[2] / "tools" / "test.py"
#: Headlines of the worked examples that aren't two thirds.
SCORES = {
    "mme": 1900.0,  # 100 of existence, 200 of each other subtask
    "text_vqa": 160 / 3,
    "mmvp": 100 / 3,
    "flickr30k": 340.0393,
    "coco_captions": 340.0393,
    "ok_vqa": 160 / 3,
    "ocr_vqa": 75.0,
}


def script(monkeypatch: pytest.MonkeyPatch, said: Mapping[str, Mapping[str, str]]) -> None:
    """Let the model answer what is said, as tokens, once it is really asked the questions."""
    answer, current = evaluate._answers, []

    def noted(model, spec, batch, benchmark, *rest):
        current[:] = [(benchmark, batch.ids)]
        return answer(model, spec, batch, benchmark, *rest)

    def generate(model, inputs, spec, **_options):
        ((benchmark, ids),) = current
        items = {item.id: item for item in benchmark.items()}
        answers = []
        for item_id, row in zip(ids, inputs["input_ids"].tolist(), strict=True):
            prompt = spec.tokenizer.decode([token for token in row if token >= 0])
            assert items[item_id].question in prompt
            text = said[benchmark.name][item_id]
            answers.append(spec.tokenizer.encode(text, add_special_tokens=False))
        return answers

    monkeypatch.setattr(evaluate, "_answers", noted)
    monkeypatch.setattr(evaluate, "generate_tokens", generate)


def test_the_twelve_give_the_papers_row(
    tiny_options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(shutil, "which", lambda name: None)  # Java takes seconds
    run, data = untrained_run(tmp_path / "run", tiny_options), tmp_path / "data"
    said = {**write_choice_benchmarks(data), **write_open_benchmarks(data)}
    script(monkeypatch, said)
    arguments = ["--benchmarks", "all", "downstream", "--data-root", data, "--batch-size", 8]
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, [run, *arguments])])
    runpy.run_path(str(TOOL), run_name="__main__")
    found = json.loads((run / "results.json").read_text())["benchmarks"]
    assert list(found) == [*TWELVE, *DOWNSTREAM]
    for name, entry in found.items():
        assert entry["num_items"] > 0 and entry["num_unreadable"] == 0, name
        expected = SCORES.get(name, 200 / 3)
        assert entry["metrics"][entry["metric"]] == pytest.approx(expected, abs=1e-3), name
    heading, _, row = (run / "results.md").read_text().splitlines()[:3]
    assert [cell.strip() for cell in heading.strip("|").split("|")] == [
        *("run", "MME-P", "MMB-en", "MMB-cn", "GQA", "SQA-I", "AI2D", "TextVQA", "MMVP", "RWQA"),
        *("COCO", "ADE", "Omni3D", "G", "K", "V", "Avg"),
    ]
    cells = [cell.strip() for cell in row.strip("|").split("|")][1:]
    assert cells == [
        *("1900.0", "66.67", "66.67", "66.67", "66.67", "66.67", "53.33", "33.33", "66.67"),
        *("66.67", "66.67", "66.67", "73.75", "62.22", "60.00", "65.14"),
    ]
