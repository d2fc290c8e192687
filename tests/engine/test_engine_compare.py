"""A config run with several methods: shared stages, resumption, the table."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from covft.engine.compare import all_methods, compare_methods, methods_table
from covft.registry import VFT


def test_every_method_is_listed_once() -> None:
    names = all_methods()
    assert len(names) == len(set(names))
    assert {VFT.get(name) for name in names} == {VFT.get(name) for name in VFT.names()}


def test_stages_are_shared_and_results_tabulated(tiny_options, tmp_path: Path) -> None:
    table = compare_methods(
        "quickstart_covft", ["BitFit", "CoVFT"], work_dir=tmp_path, options=tiny_options
    )
    one, two = (tmp_path / method / "pretrain" for method in ("BitFit", "CoVFT"))
    assert (one / "weights.safetensors").samefile(two / "weights.safetensors")
    assert (one / "train.log").is_file() and not (two / "train.log").exists()
    vision = [
        set(load_file(tmp_path / method / "finetune" / "weights.safetensors"))
        for method in ("BitFit", "CoVFT")
    ]
    assert any(".bias" in name for name in vision[0]) and not any("cve" in n for n in vision[0])
    assert any("cve" in name for name in vision[1])

    rows = table.splitlines()[2:]
    assert {row.split("|")[1].strip() for row in rows} == {"BitFit", "CoVFT"}
    results = json.loads((tmp_path / "methods.json").read_text())
    assert results["BitFit"]["trainable_parameters"]["vision"] < 2000
    assert f"{results['CoVFT']['trainable_parameters']['vision']:,}" in table
    assert (tmp_path / "methods.md").read_text() == table + "\n"

    # Again, with one method more: the finished runs stay as they are.
    before = (tmp_path / "CoVFT" / "finetune" / "weights.safetensors").stat().st_mtime_ns
    again = compare_methods(
        "quickstart_covft", ["Freeze", "CoVFT"], work_dir=tmp_path, options=tiny_options
    )
    assert (tmp_path / "CoVFT" / "finetune" / "weights.safetensors").stat().st_mtime_ns == before
    assert len(again.splitlines()) == 5


def test_another_stage_one_is_not_shared(tiny_options, tmp_path: Path) -> None:
    compare_methods("quickstart_covft", ["Freeze"], work_dir=tmp_path, options=tiny_options)
    other = {**tiny_options, "stages.pretrain.train_cfg.max_iters": 2}
    compare_methods("quickstart_covft", ["Full"], work_dir=tmp_path, options=other)
    one, two = (tmp_path / name / "pretrain/weights.safetensors" for name in ("Freeze", "Full"))
    assert not one.samefile(two)


def test_a_config_that_scores_nothing(tiny_options, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no 'evaluation'"):
        compare_methods(
            "quickstart_covft",
            ["Freeze"],
            work_dir=tmp_path,
            options={**tiny_options, "evaluation": None},
        )


def test_the_table_puts_the_best_first_and_marks_what_is_missing() -> None:
    common = {"num_questions": 10, "train_seconds": None}
    table = methods_table(
        {
            "Full": {**common, "accuracy": 0.5, "blind_accuracy": None},
            "LoRA": {**common, "accuracy": 0.75, "trainable_parameters": {"vision": 1234}},
        }
    )
    assert table.splitlines() == [
        "| method | accuracy | blind accuracy | questions | trainable in vision | training |",
        "|---|---|---|---|---|---|",
        "| LoRA | 75.0% | - | 10 | 1,234 | - |",
        "| Full | 50.0% | - | 10 | - | - |",
    ]
