"""tools/test.py: what it evaluates, its phases and files, the checks of data and counts."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from untrained_run import untrained_run

from covft.checkpoints import build_model
from covft.checkpoints.trainable import save_weights
from covft.config import CONFIG_ROOT, load_config, stage_configs
from covft.engine.evaluation import Options
from covft.engine.results import evaluate_run, evaluate_subject
from covft.engine.subject import finished_run
from covft.evaluation import EasyVQA
from covft.evaluation.benchmarks import DOWNSTREAM, TWELVE, named_benchmarks
from covft.evaluation.chosen import chosen_benchmarks
from covft.evaluation.evaluate import Effort
from covft.models import MLLM

TOOL = Path(__file__).parents[2] / "tools" / "test.py"


@pytest.fixture
def run_dir(tiny_options, tmp_path: Path) -> Path:
    """A finished run of one stage, its model untrained."""
    return untrained_run(tmp_path / "run", tiny_options)


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        runpy.run_path(str(TOOL), run_name="__main__")

    return call


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_args, **_kwargs) -> None:
        raise AssertionError("a model was built")

    def apply() -> None:
        monkeypatch.setattr(MLLM, "__init__", refuse)

    return apply


def results(folder: Path, name: str = "results.json") -> dict:
    return json.loads((folder / name).read_text())


def test_a_run_is_scored_as_its_config_asks(tool, run_dir: Path, tokenizer_folders) -> None:
    tool(run_dir)
    found = results(run_dir)
    entry = found["benchmarks"]["easy_vqa"]
    assert entry["num_items"] == 24 and 0 <= entry["metrics"]["accuracy"] <= 100
    assert entry["num_official"] == 9673 and entry["seconds"] > 0
    assert entry["config"]["type"] == "EasyVQA" and entry["blind_metrics"] is None
    assert (run_dir / entry["predictions"]).is_file()
    assert len(found["provenance"]["weights"]) == 64
    assert found["trainable_parameters"]["vision"] > 0


def test_phases(tool, no_model, run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="answer the questions first"):
        tool(run_dir, "--phase", "score")
    tool(run_dir, "--phase", "infer", "--work-dir", tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()
    no_model()
    tool(run_dir, "--phase", "score", "--work-dir", tmp_path / "out")
    assert results(tmp_path / "out")["benchmarks"]["easy_vqa"]["num_items"] == 24
    with pytest.raises(AssertionError, match="a model was built"):
        tool(run_dir, "--work-dir", tmp_path / "out")


def test_answers_of_other_weights_are_not_scored(tool, run_dir: Path, tiny_options) -> None:
    tool(run_dir, "--phase", "infer")
    before = (run_dir / "predictions" / "easy_vqa.jsonl").read_bytes()
    ((_, stage),) = stage_configs(load_config(run_dir / "config.py"))
    save_weights(build_model(stage, seed=9), run_dir / "weights.safetensors", metadata={})
    with pytest.raises(SystemExit, match=r"weights: \w{64} in the file, \w{64} here"):
        tool(run_dir, "--phase", "score")
    assert (run_dir / "predictions" / "easy_vqa.jsonl").read_bytes() == before
    tool(run_dir)
    assert (run_dir / "predictions" / "easy_vqa.jsonl.old1").read_bytes() == before


@pytest.mark.parametrize("checkpoint", [".", "weights.safetensors"])
def test_a_config_with_a_checkpoint(tool, run_dir: Path, tmp_path: Path, checkpoint: str) -> None:
    tool(run_dir)
    tool(run_dir / "config.py", run_dir / checkpoint, "--work-dir", tmp_path / "again")
    one, two = (
        (folder / "predictions" / "easy_vqa.jsonl").read_text().splitlines()
        for folder in (run_dir, tmp_path / "again")
    )
    assert one[1:] == two[1:]
    with pytest.raises(SystemExit, match="no weights at"):
        tool(run_dir / "config.py", run_dir / "absent")
    with pytest.raises(SystemExit, match="is no run"):
        tool(run_dir / "config.py")


def test_benchmarks_by_name_and_a_limit(tool, run_dir: Path, easy_vqa_root: Path) -> None:
    root = run_dir.parent / "data"
    root.mkdir()
    (root / EasyVQA.folder).symlink_to(easy_vqa_root)
    arguments = (run_dir, "--benchmarks", "easy_vqa", "--data-root", root)
    tool(*arguments, "--limit", 5, "--batch-size", 2)
    found = results(run_dir, "results_limit5.json")["benchmarks"]["easy_vqa"]
    assert found["num_items"] == found["limit"] == 5
    assert not (run_dir / "results.json").exists()
    with pytest.raises(SystemExit, match=r"no benchmark 'easyvqa'; did you mean 'easy_vqa'"):
        tool(run_dir, "--benchmarks", "easyvqa")


def test_cfg_options_give_results_of_their_own(tool, run_dir: Path) -> None:
    tool(run_dir, "--cfg-options", "evaluation.benchmark.limit=3")
    (path,) = run_dir.glob("results_*.json")
    tag = path.stem.removeprefix("results")
    assert results(run_dir, path.name)["benchmarks"]["easy_vqa"]["num_items"] == 3
    assert (run_dir / "predictions" / f"easy_vqa{tag}.jsonl").is_file()
    with pytest.raises(SystemExit, match="no effect with --benchmarks"):
        tool(run_dir, "--benchmarks", "gqa", "--cfg-options", "evaluation.benchmark.limit=3")
    with pytest.raises(SystemExit, match=r"evaluation\.batchsize is unknown"):
        tool(run_dir, "--benchmarks", "gqa", "--cfg-options", "evaluation.batchsize=3")
    with pytest.raises(SystemExit, match=r"seed: of a trained run only evaluation\.\* can change"):
        tool(run_dir, "--cfg-options", "seed=3")


def test_check_data_needs_no_model(
    tool, no_model, run_dir: Path, easy_vqa_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_model()
    with pytest.raises(SystemExit) as ended:
        tool(run_dir, "--check-data")
    assert ended.value.code == 1
    assert "easy_vqa: 24 of 9673 items, NOT the official number" in capsys.readouterr().out
    (easy_vqa_root / "test" / "images" / "3.png").unlink()
    with pytest.raises(SystemExit) as ended:
        tool(run_dir, "--check-data")
    out = capsys.readouterr().out
    assert ended.value.code == 1 and "1 images missing" in out and "3.png" in out
    with pytest.raises(SystemExit) as ended:
        tool(run_dir, "--check-data", "--limit", 2)
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("ok      easy_vqa: 2 items")


def test_check_data_of_all_benchmarks_lists_what_is_missing(
    tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        tool("--benchmarks", "all", "downstream", "--check-data", "--data-root", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 1 and len(lines) == 17
    assert all(line.startswith("MISSING") for line in lines)
    with pytest.raises(SystemExit) as ended:
        tool("--check-data")
    assert ended.value.code == 2


def test_missing_files_are_told_before_the_model_is_built(
    tool, no_model, run_dir: Path, tmp_path: Path
) -> None:
    no_model()
    arguments = (run_dir, "--benchmarks", "gqa", "mmvp", "--data-root", tmp_path)
    with pytest.raises(SystemExit, match=r"gqa: (.|\n)*mmvp: "):
        tool(*arguments)


def test_strict_fails_at_the_end(tool, run_dir: Path, easy_vqa_root: Path) -> None:
    (easy_vqa_root / "test" / "images" / "3.png").unlink()
    expected = r"24 items, but officially there are 9673; easy_vqa: 4 items couldn't be asked"
    with pytest.raises(SystemExit, match=expected):
        tool(run_dir, "--strict")
    with pytest.raises(SystemExit, match=expected):
        tool(run_dir, "--strict", "--phase", "infer")
    entry = results(run_dir)["benchmarks"]["easy_vqa"]
    assert entry["num_unreadable"] == 4 and list(entry["unreadable"]) == ["12", "13", "14", "15"]


def test_results_of_other_benchmarks_stay_and_those_of_other_weights_go(
    tool, run_dir: Path
) -> None:
    tool(run_dir)
    held = results(run_dir)
    held["benchmarks"]["mmvp"] = {**held["benchmarks"]["easy_vqa"], "title": "MMVP"}
    held["train_seconds"] = 7.0
    (run_dir / "results.json").write_text(json.dumps(held))
    tool(run_dir)
    found = results(run_dir)
    assert list(found["benchmarks"]) == ["easy_vqa", "mmvp"] and found["train_seconds"] == 7.0
    assert "| MMVP |" in (run_dir / "results.md").read_text()
    held["provenance"]["weights"] = "0" * 64
    (run_dir / "results.json").write_text(json.dumps(held))
    tool(run_dir)
    assert list(results(run_dir)["benchmarks"]) == ["easy_vqa"]
    assert "mmvp" in results(run_dir, "results.json.old1")["benchmarks"]


def test_results_of_another_precision_are_set_aside(tool, run_dir: Path) -> None:
    tool(run_dir)
    held = results(run_dir)
    entry = held["benchmarks"].pop("easy_vqa")
    assert entry["fingerprint"]["precision"] == "as loaded"
    assert entry["fingerprint"]["model"].startswith("sha256:")
    held["benchmarks"]["mmvp"] = {**entry, "title": "MMVP"}
    held["train_seconds"] = 7.0
    (run_dir / "results.json").write_text(json.dumps(held))
    tool(run_dir, "--precision", "fp32")
    found = results(run_dir)
    assert list(found["benchmarks"]) == ["easy_vqa"] and found["train_seconds"] == 7.0
    assert list(results(run_dir, "results.json.old1")["benchmarks"]) == ["mmvp"]


def test_scores_are_of_the_runs_precision_and_resizing(tool, run_dir: Path) -> None:
    tool(run_dir, "--precision", "fp32", "--phase", "infer")
    with pytest.raises(SystemExit, match="precision: fp32 in the file, as loaded here"):
        tool(run_dir, "--phase", "score")
    tool(run_dir, "--precision", "fp32", "--phase", "score")
    path = run_dir / "predictions" / "easy_vqa.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    for key, value in (("resize", "crop"), ("template", "T"), ("max_new_tokens", "3")):
        header = json.loads(first)
        header["fingerprint"][key] = value
        path.write_text(json.dumps(header) + "\n" + "".join(others))
        with pytest.raises(SystemExit, match=f"{key}: {value} in the file"):
            tool(run_dir, "--precision", "fp32", "--phase", "score")


def test_two_calls_at_once_keep_each_others_results(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from covft.engine import results as module

    subject, path = finished_run(run_dir), run_dir / "results.json"
    entry = {"fingerprint": {}, "limit": 1, "num_official": 1, "num_items": 1, "num_unreadable": 0}

    def other(*_arguments):
        yield "b", dict(entry), Effort()

    def interrupted(*_arguments):
        yield "a", dict(entry), Effort()
        monkeypatch.setattr(module, "run_benchmarks", other)
        evaluate_subject(subject, [], path, options)
        yield "c", dict(entry), Effort()

    options = Options(phase="score")
    monkeypatch.setattr(module, "run_benchmarks", interrupted)
    found = evaluate_subject(subject, [], path, options)
    assert found == results(run_dir) and list(found["benchmarks"]) == ["a", "b", "c"]


def test_seconds_are_those_of_answering(tool, run_dir: Path) -> None:
    def seconds() -> float | None:
        return results(run_dir)["benchmarks"]["easy_vqa"]["seconds"]

    tool(run_dir)
    once = seconds()
    tool(run_dir)
    tool(run_dir, "--phase", "score")
    assert once is not None and seconds() == once
    path = run_dir / "predictions" / "easy_vqa.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))
    tool(run_dir)
    assert seconds() > once
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))
    (run_dir / "results.json").unlink()  # what was killed wrote none
    tool(run_dir)
    assert seconds() is None


def test_a_benchmark_that_cannot_be_scored_does_not_stop_the_others(
    tool, run_dir: Path, easy_vqa_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poor(EasyVQA):
        name = "poor"

        def score(self, predictions):
            raise ImportError("no package 'scorer'")

    class Poorer(Poor):
        name = "poorer"

        def score(self, predictions):
            raise KeyError("answer")

    from covft.checkpoints import load_run

    run = load_run(run_dir)
    run.config.evaluation = {
        "benchmarks": [
            {"type": kind, "root": str(easy_vqa_root), "limit": 2}
            for kind in (Poor, Poorer, EasyVQA)
        ]
    }
    expected = r"poor couldn't be .*no package 'scorer'\npoorer couldn't .*KeyError: 'answer'$"
    with pytest.raises(ValueError, match=expected):
        evaluate_run(run, run_dir, train_seconds=2.0)
    found = results(run_dir)
    assert list(found["benchmarks"]) == ["easy_vqa"] and found["train_seconds"] == 2.0

    def fail(*_arguments):
        raise ImportError("no package 'scorer'")

    monkeypatch.setattr(EasyVQA, "score", fail)
    with pytest.raises(SystemExit, match="easy_vqa couldn't be scored: ImportError: no package"):
        tool(run_dir)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("RUN", "--phase", "score", "--batch-size", 2), "--batch-size has no effect with --phase"),
        (("RUN", "--phase", "score", "--device", "cpu"), "--device has no effect with --phase"),
        (
            ("RUN", "--data-root", "x", "--cfg-options", "evaluation.data_root=y"),
            r"--data-root and --cfg-options evaluation\.data_root say the same",
        ),
        (
            ("RUN", "--batch-size", 2, "--cfg-options", "evaluation.batch_size=3"),
            r"--batch-size and --cfg-options evaluation\.batch_size",
        ),
        (
            ("RUN", "--precision", "fp16", "--cfg-options", "evaluation.precision=fp32"),
            r"--precision and --cfg-options evaluation\.precision",
        ),
        (
            ("RUN", "--limit", 2, "--cfg-options", "evaluation.benchmark.limit=3"),
            r"--limit and --cfg-options evaluation\.benchmark\.limit",
        ),
        (
            ("--benchmarks", "gqa", "--check-data", "--cfg-options", "evaluation.data_root=y"),
            "but no run is named",
        ),
    ],
)
def test_options_without_effect_are_refused(tool, no_model, run_dir, arguments, message) -> None:
    no_model()
    with pytest.raises(SystemExit, match=message):
        tool(*(run_dir if argument == "RUN" else argument for argument in arguments))


def test_a_class_on_the_python_path_is_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_pets.py").write_text(
        "from covft.evaluation import EasyVQA\n\n\n"
        "class Pets(EasyVQA):\n    name = 'own_pets'\n    folder = 'pets'\n"
    )
    with pytest.raises(ValueError, match=r"'own_pets\.Pets' can't be imported: No module"):
        named_benchmarks(["own_pets.Pets"])
    monkeypatch.syspath_prepend(tmp_path)
    named = named_benchmarks(["own_pets.Pets", "gqa"])
    built = chosen_benchmarks({}, named=named, data_root="d")
    assert [one.benchmark.name for one in built] == ["own_pets", "gqa"]
    assert built[0].config["type"] == "own_pets.Pets"
    with pytest.raises(ValueError, match=r"'own_pets\.Dogs' can't be imported: .*Dogs"):
        named_benchmarks(["own_pets.Dogs"])
    with pytest.raises(ValueError, match="must be a subclass of"):
        named_benchmarks(["pathlib.Path"])


def test_evaluation_may_name_several_benchmarks(run_dir: Path, easy_vqa_root: Path) -> None:
    from covft.checkpoints import load_run

    run = load_run(run_dir)
    benchmark = {"type": EasyVQA, "root": str(easy_vqa_root)}
    run.config.evaluation = {"benchmarks": [benchmark], "data_root": "data"}
    found = evaluate_run(run, run_dir, train_seconds=2.0)
    assert found["benchmarks"]["easy_vqa"]["num_items"] == 24 and found["train_seconds"] == 2.0
    run.config.evaluation = {"benchmarks": [benchmark, benchmark]}
    with pytest.raises(ValueError, match="'easy_vqa' is asked for twice"):
        evaluate_run(run, run_dir)
    run.config.evaluation = {"blind": True}
    with pytest.raises(ValueError, match=r"has no evaluation\.benchmark"):
        evaluate_run(run, run_dir)


def test_half_precision_leaves_the_rotary_frequencies_alone(
    tool, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from covft.engine import evaluation

    models = []

    def infer(model, *arguments, **options):
        models.append(model)
        return original(model, *arguments, **options)

    original = evaluation.infer
    monkeypatch.setattr(evaluation, "infer", infer)
    tool(run_dir, "--precision", "bf16", "--work-dir", run_dir.parent / "half")
    (model,) = models
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.llm.model.model.rotary_emb.inv_freq.dtype == torch.float32
    with pytest.raises(SystemExit, match="precision: bf16 in the file"):
        tool(
            *(run_dir, "--precision", "fp16", "--phase", "score"),
            *("--work-dir", run_dir.parent / "half"),
        )
    with pytest.raises(SystemExit, match=r"evaluation\.precision 'half' is unknown"):
        tool(run_dir, "--cfg-options", "evaluation.precision=half")


def test_names_on_the_command_line_are_those_in_files_and_in_the_configs() -> None:
    for part, known in (("twelve", TWELVE), ("downstream", DOWNSTREAM)):
        by_name = chosen_benchmarks({}, named=named_benchmarks(list(known)), data_root="d")
        assert [one.benchmark.name for one in by_name] == list(known)
        path = CONFIG_ROOT / "_base_" / "evaluation" / f"{part}.py"
        by_config = chosen_benchmarks(load_config(path).evaluation, data_root="d")
        assert [dict(one.config) for one in by_config] == [dict(one.config) for one in by_name]
