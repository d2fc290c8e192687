"""A config run with several methods: shared stages, resumption, the table."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from covft.config import load_config
from covft.engine import compare
from covft.engine.compare import all_methods, compare_methods, method_configs, methods_table
from covft.registry import VFT

ROOT = Path(__file__).parents[2]


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


def test_the_quickstart_runs_with_each_method_by_one_override(tiny_options, tmp_path: Path) -> None:
    short = {"train_cfg.max_iters": 1, "stages.pretrain.train_cfg.max_iters": 1}
    options = {**tiny_options, **short, "evaluation.benchmark.limit": 4}
    table = compare_methods("quickstart_covft", all_methods(), work_dir=tmp_path, options=options)
    assert {row.split("|")[1].strip() for row in table.splitlines()[2:]} == set(all_methods())
    first = tmp_path / all_methods()[0] / "pretrain" / "weights.safetensors"
    for method in all_methods():
        folder = tmp_path / method
        results = json.loads((folder / "results.json").read_text())
        entry = results["benchmarks"]["easy_vqa"]
        assert entry["num_items"] == 4 and 0 <= entry["metrics"]["accuracy"] <= 100, method
        trained = results["trainable_parameters"]["vision"]
        assert (trained == 0) == (method == "Freeze"), method
        assert (folder / "pretrain" / "weights.safetensors").samefile(first), method
        weights = load_file(folder / "finetune" / "weights.safetensors")
        assert any(name.startswith("vision.") for name in weights) == (method != "Freeze"), method
        vft = load_config(folder / "config.py").model.vision.vft
        assert vft.to_dict() == {"type": method}


@pytest.mark.parametrize("other", [{"seed": 7}, {"train_dataset.balanced": False}])
def test_runs_of_another_seed_or_config_are_not_mixed_in(
    tiny_options, tmp_path: Path, capsys: pytest.CaptureFixture[str], other: dict
) -> None:
    short = {"train_cfg.max_iters": 1, "stages.pretrain.train_cfg.max_iters": 1}
    options = {**tiny_options, **short, "evaluation.benchmark.limit": 4}
    compare_methods("quickstart_covft", ["Freeze"], work_dir=tmp_path, options=options)
    changed = {**options, **other}
    table = compare_methods("quickstart_covft", ["Full"], work_dir=tmp_path, options=changed)
    one, two = (tmp_path / name / "pretrain/weights.safetensors" for name in ("Freeze", "Full"))
    assert one.samefile(two) == ("seed" not in other)
    assert "| Full |" in table and "Freeze" not in table
    assert "not in the table: Freeze; their configs differ" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is finished, but was trained with another config"):
        compare_methods("quickstart_covft", ["Freeze"], work_dir=tmp_path, options=changed)


def test_the_own_method_keeps_its_options_and_the_others_their_defaults() -> None:
    options = {"model.vision.vft.num_experts": 2, "train_cfg.max_iters": 5}
    configs = method_configs("llava15_7b_covft_blocks_0_10", ["CoVFT", "LoRA", "Freeze"], options)
    found = {name: cfg.to_dict()["model"]["vision"]["vft"] for name, cfg in configs.items()}
    own = {"type": "CoVFT", "first_block": 0, "last_block": 10, "num_experts": 2}
    assert found == {"CoVFT": own, "LoRA": {"type": "LoRA"}, "Freeze": {"type": "Freeze"}}
    assert all(cfg.train_cfg.max_iters == 5 for cfg in configs.values())
    with pytest.raises(ValueError, match=r"num_experts would have no effect: it is about CoVFT"):
        method_configs("llava15_7b_covft_blocks_0_10", ["LoRA"], options)


def test_every_method_is_checked_before_the_first_is_trained(tiny_options, tmp_path: Path) -> None:
    options = {**tiny_options, "model.vision.vft.first_block": 99}
    with pytest.raises(ValueError, match="first_block is 99"):
        compare_methods(
            "quickstart_covft", ["Freeze", "CoVFT"], work_dir=tmp_path / "runs", options=options
        )
    assert not (tmp_path / "runs").exists()


def test_the_table_is_there_when_a_later_method_fails(
    tiny_options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = compare.train

    def fail(cfg, **options) -> None:
        if cfg.model.vision.vft.type == "LoRA":
            raise RuntimeError("out of memory")
        original(cfg, **options)

    monkeypatch.setattr(compare, "train", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        compare_methods(
            "quickstart_covft", ["Freeze", "LoRA"], work_dir=tmp_path, options=tiny_options
        )
    assert "| Freeze |" in (tmp_path / "methods.md").read_text()
    assert list(json.loads((tmp_path / "methods.json").read_text())) == ["Freeze"]


def test_help_lists_the_methods(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare_methods.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "tools" / "compare_methods.py"), run_name="__main__")
    words = capsys.readouterr().out.replace(",", " ").replace(";", " ").split()
    assert set(all_methods()) <= set(words)


def test_a_config_that_scores_nothing(tiny_options, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no 'evaluation'"):
        compare_methods(
            "quickstart_covft",
            ["Freeze"],
            work_dir=tmp_path,
            options={**tiny_options, "evaluation": None},
        )


def test_the_table_puts_the_best_first_and_marks_what_is_missing() -> None:
    entry = {"title": "easy-VQA", "metric": "accuracy", "max_score": 100.0, "num_items": 10}
    full, lora = ({**entry, "metrics": {"accuracy": score}} for score in (50.0, 75.0))
    blind = {"blind_metrics": {"accuracy": 25.0}}
    results = {
        "Full": {"benchmarks": {"easy_vqa": {**full, **blind}}, "train_seconds": 7.4},
        "LoRA": {"benchmarks": {"easy_vqa": lora}, "trainable_parameters": {"vision": 1234}},
    }
    assert methods_table(results).splitlines() == [
        "| method | accuracy | blind accuracy | questions | trainable in vision | training |",
        "|---|---|---|---|---|---|",
        "| LoRA | 75.0% | - | 10 | 1,234 | - |",
        "| Full | 50.0% | 25.0% | 10 | - | 7 s |",
    ]


def test_several_benchmarks_have_a_column_each() -> None:
    mme = {"title": "MME-P", "metric": "perception", "max_score": 2000.0, "num_items": 4}
    gqa = {"title": "GQA", "metric": "accuracy", "max_score": 100.0, "num_items": 6}
    results = {
        "Full": {
            "benchmarks": {
                "mme": {**mme, "metrics": {"perception": 1510.25}},
                "gqa": {**gqa, "metrics": {"accuracy": 61.96}},
            }
        },
        "LoRA": {"benchmarks": {"mme": {**mme, "metrics": {"perception": 1400.0}}}},
    }
    assert methods_table(results).splitlines()[0].startswith("| method | MME-P | GQA | questions |")
    assert methods_table(results).splitlines()[2:] == [
        "| Full | 1510.2 | 62.0% | 10 | - | - |",
        "| LoRA | 1400.0 | - | 4 | - | - |",
    ]
