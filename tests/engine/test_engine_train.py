"""Whole runs on the miniature: two stages, resume, results, bad data."""

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from toy_training import ToyModel, toy_runner

from covft.checkpoints import load_run
from covft.checkpoints.run import build_model
from covft.config import load_config
from covft.engine import train as train_module
from covft.engine.preflight import check_run
from covft.engine.results import evaluate_run
from covft.engine.scalars_hook import ScalarsHook, read_scalars
from covft.engine.train import train
from covft.registry import VFT
from covft.vft import Full

STAGES = ("pretrain", "finetune")


def run(options, work_dir: Path, *, method: str = "covft", resume: bool = False) -> None:
    train(load_config(f"quickstart_{method}", options), work_dir=work_dir, resume=resume)


def losses(work_dir: Path) -> list[list[float]]:
    return [[r["loss"] for r in read_scalars(work_dir / s / "scalars.jsonl")] for s in STAGES]


def test_two_stages_and_their_results(tiny_options, tmp_path: Path) -> None:
    work_dir = tmp_path / "quickstart_covft"
    run(tiny_options, work_dir)
    results = json.loads((work_dir / "results.json").read_text())
    entry = results["benchmarks"]["easy_vqa"]
    assert entry["num_items"] == 10
    assert 0 <= entry["metrics"]["accuracy"] <= 100
    assert 0 <= entry["blind_metrics"]["accuracy"] <= 100
    assert 0 < results["train_seconds"] < results["total_seconds"]
    assert results["num_threads"] == torch.get_num_threads()
    assert results["weights_source"] == dict.fromkeys(("vision", "llm", "text_encoder"), "random")
    assert [len(stage) for stage in losses(work_dir)] == [3, 3]
    pretrained = load_file(work_dir / "pretrain" / "weights.safetensors")
    assert {name.split(".")[0] for name in pretrained} == {"projector"}
    assert (work_dir / "finetune" / "loss_curve.png").stat().st_size > 1000
    log = (work_dir / "finetune" / "train.log").read_text()
    assert "training sample 0" in log and "generations after 0 steps" in log and "«" in log


def test_a_stage_leaves_no_model_behind(
    tiny_options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The optimizer has the parameters and nothing else of the model.
    parts: list[weakref.ref] = []

    def assert_freed() -> None:
        assert [part() for part in parts] == [None] * len(parts)

    def build(*args, **kwargs):
        assert_freed()
        model = build_model(*args, **kwargs)
        parts.extend([weakref.ref(model), weakref.ref(next(model.projector.parameters()))])
        return model

    monkeypatch.setattr(train_module, "build_model", build)
    monkeypatch.setattr(train_module, "load_run", lambda _: assert_freed())
    monkeypatch.setattr(train_module, "evaluate_run", lambda *args, **kwargs: None)
    gc.disable()  # by luck, it would be freed without our doing
    try:
        run(tiny_options, tmp_path)
    finally:
        gc.enable()
    assert len(parts) == 4


def test_a_closed_runner_holds_nothing(tmp_path: Path) -> None:
    model = ToyModel()
    part = weakref.ref(model.llm.weight)
    runner = toy_runner(tmp_path, model=model, max_iters=4)
    runner.train()
    del model
    runner.close()
    gc.collect()
    assert part() is None
    assert runner.hooks == []


def test_stage_two_starts_from_stage_one(tiny_options, tmp_path: Path) -> None:
    options = {
        **tiny_options,
        "optim_wrapper.optimizer.lr": 1e-12,
        "optim_wrapper.lr.projector": 1e-12,
    }
    run(options, tmp_path)
    one, two = (load_file(tmp_path / s / "weights.safetensors") for s in STAGES)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("where", STAGES)
def test_interrupted_run_resumes_to_the_same_weights(
    tiny_options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    run(tiny_options, tmp_path / "whole")
    original = ScalarsHook.after_train_iter

    def stop(self, runner, batch_idx, data_batch=None, outputs=None):
        original(self, runner, batch_idx, data_batch, outputs)
        if Path(runner.work_dir).name == where and batch_idx == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ScalarsHook, "after_train_iter", stop)
        run(tiny_options, tmp_path / "cut")
    assert not (tmp_path / "cut" / where / "weights.safetensors").exists()
    run(tiny_options, tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for stage in STAGES:
        expected, found = (
            load_file(tmp_path / run_name / stage / "weights.safetensors")
            for run_name in ("whole", "cut")
        )
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_resume_of_a_finished_run_trains_nothing(tiny_options, tmp_path: Path) -> None:
    run(tiny_options, tmp_path)
    before = (tmp_path / "finetune" / "weights.safetensors").stat().st_mtime_ns
    run(tiny_options, tmp_path, resume=True)
    assert (tmp_path / "finetune" / "weights.safetensors").stat().st_mtime_ns == before


def test_resume_with_another_config_than_a_finished_stage(tiny_options, tmp_path: Path) -> None:
    run(tiny_options, tmp_path)
    with pytest.raises(ValueError, match=r"another config:(.|\n)*max_iters(.|\n)*--work-dir"):
        run({**tiny_options, "train_cfg.max_iters": 4}, tmp_path, resume=True)


def test_resume_with_another_seed_than_a_finished_stage(tiny_options, tmp_path: Path) -> None:
    run({**tiny_options, "seed": 3}, tmp_path)
    before = (tmp_path / "config.py").read_text()
    with pytest.raises(ValueError, match=r"another config:\n-seed = 3\n\+seed = 4\n"):
        run({**tiny_options, "seed": 4}, tmp_path, resume=True)
    assert (tmp_path / "config.py").read_text() == before


def test_resume_of_a_checkpoint_tells_of_another_seed(tiny_options, tmp_path: Path) -> None:
    options = {**tiny_options, "stages": {"_delete_": True}, "evaluation": None}
    run(options, tmp_path)
    (tmp_path / "weights.safetensors").unlink()
    run({**options, "seed": 4}, tmp_path, resume=True)
    log = (tmp_path / "train.log").read_text()
    assert "-seed = 0\n+seed = 4" in log[log.index("the config has changed") :]


def test_kill_between_the_weights_and_their_timing(tiny_options, tmp_path: Path) -> None:
    run(tiny_options, tmp_path)
    (tmp_path / "finetune" / "timing.json").unlink()
    (tmp_path / "results.json").unlink()
    run(tiny_options, tmp_path, resume=True)
    results = json.loads((tmp_path / "results.json").read_text())
    assert 0 < results["train_seconds"] < results["total_seconds"]


def test_a_run_starts_from_another_run(tiny_options, tmp_path: Path) -> None:
    run(tiny_options, tmp_path / "first", method="freeze")
    still = {"optim_wrapper.optimizer.lr": 1e-12, "optim_wrapper.lr.projector": 1e-12}
    still["stages.pretrain.optim_wrapper.optimizer.lr"] = 1e-12
    run(
        {**tiny_options, **still, "load_from": str(tmp_path / "first")},
        tmp_path / "second",
        method="freeze",
    )
    one, two = (
        load_file(tmp_path / r / "finetune" / "weights.safetensors") for r in ("first", "second")
    )
    for name in one:
        if name.startswith(("llm", "projector")):
            torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-7)


def test_fresh_run_in_a_used_folder_keeps_the_old_stages(tiny_options, tmp_path: Path) -> None:
    run(tiny_options, tmp_path)
    old = (tmp_path / "finetune" / "weights.safetensors").read_bytes()
    run({**tiny_options, "seed": 5}, tmp_path)
    assert (tmp_path / "finetune.old1" / "weights.safetensors").read_bytes() == old
    assert (tmp_path / "finetune" / "weights.safetensors").read_bytes() != old


def test_a_loaded_run_answers_like_the_trained_model(tiny_options, tmp_path: Path) -> None:
    run(tiny_options, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    loaded = load_run(tmp_path)
    predictions = tmp_path / "predictions" / "easy_vqa.jsonl"
    before = predictions.read_text()
    predictions.unlink()
    again = evaluate_run(loaded, tmp_path)
    assert predictions.read_text() == before
    assert again["train_seconds"] == results["train_seconds"]
    trained = load_file(tmp_path / "finetune" / "weights.safetensors")
    own = loaded.model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in trained.items())


def test_twins_are_printed_together(tiny_options, tmp_path: Path) -> None:
    names = [f"quickstart_{method}" for method in ("covft", "freeze", "full")]
    for method in ("covft", "freeze"):
        run(tiny_options, tmp_path / f"quickstart_{method}", method=method)
    log = (tmp_path / names[1] / "finetune" / "train.log").read_text()
    rows = [line.split()[0] for line in log.splitlines() if line.startswith("quickstart_")]
    assert rows == [names[1], names[0]]
    frozen = load_file(tmp_path / "quickstart_freeze" / "finetune" / "weights.safetensors")
    assert {name.split(".")[0] for name in frozen} == {"projector", "llm"}


def test_unfinished_or_foreign_folders(tiny_options, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no run"):
        load_run(tmp_path)
    run(tiny_options, tmp_path / "r")
    (tmp_path / "r" / "finetune" / "weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"isn't finished; continue it with .* --resume"):
        load_run(tmp_path / "r")


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--device nosuch can't be used"):
        load_run(tmp_path, device="nosuch")


def test_nothing_more_is_left_out_than_was_planted(tiny_options, tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for number in range(6):
        Image.new("RGB", (20, 20), (40 * number, 0, 0)).save(root / f"{number}.jpg")
    (root / "3.jpg").write_bytes((root / "3.jpg").read_bytes()[:200])

    def record(name: str, image: str | None, question: str = "<image>is it red?") -> dict:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}]
        return {"id": name, "conversations": turns, **({"image": image} if image else {})}

    records = [
        record("good0", "0.jpg"),
        record("good1", "1.jpg"),
        record("text", None, "is it red?"),
        record("missing", "nowhere.jpg"),
        record("truncated", "3.jpg"),
        {"id": "empty", "image": "4.jpg", "conversations": []},
        record("tags", "5.jpg", "<image><image>is it red?"),
    ]
    (root / "data.json").write_text(json.dumps(records))
    options = {
        **tiny_options,
        "train_dataset": {
            "_delete_": True,
            "type": "InstructDataset",
            "annotations": str(root / "data.json"),
            "image_root": str(root),
        },
        "train_cfg.max_iters": 6,
    }
    run(options, tmp_path / "run")
    listed = (tmp_path / "run" / "finetune" / "bad_samples.jsonl").read_text().splitlines()
    found = {json.loads(line)["id"]: json.loads(line)["reason"] for line in listed}
    assert len(listed) == 4 and set(found) == {"missing", "truncated", "empty", "tags"}
    assert "nowhere.jpg" in found["missing"] and "can't be read" in found["truncated"]
    assert "2 <image> tags but 1 images" in found["tags"]


def test_unknown_logging_and_evaluation_keys(tiny_options, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"logging\.intervall is unknown"):
        run({**tiny_options, "logging.intervall": 3}, tmp_path / "a")
    with pytest.raises(ValueError, match=r"evaluation\.blnd is unknown; did you mean 'blind'"):
        run({**tiny_options, "evaluation.blnd": True}, tmp_path / "b")
    with pytest.raises(ValueError, match="'train_dataloader' takes no argument 'batchsize'"):
        run({**tiny_options, "train_dataloader.batchsize": 3}, tmp_path / "c")
    assert not any((tmp_path / name).exists() for name in "abc"), "found before anything is written"


def wrong_vft(**vft) -> dict:
    return {"model.vision.vft": {"_delete_": True, **vft}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (wrong_vft(type="LoRA", ranks=8), "'LoRA' takes no argument 'ranks'; did you mean 'rank'"),
        (wrong_vft(type="Lora"), "'Lora' is not a VFT method; did you mean 'LoRA'"),
        (wrong_vft(type="CoVFT", num_experts=0), "num_experts must be at least 1, got 0"),
        (wrong_vft(type="CoVFT", first_block=99), "first_block is 99, but the encoder consumes"),
        ({"model.text_encoder": None}, "reads the instruction; add model.text_encoder"),
        ({"model.text_encoder.type": "TextEncoderr"}, "'TextEncoderr' is not a text encoder"),
        ({"model.llm": {"_delete_": True, "weights": None}}, "LLM: 'type' is missing"),
        ({"model.vision.backbone": "CLIP"}, r"backbone must be dict\(type=.*\), got 'CLIP'"),
        ({"model.vision.backbone.arc": "b"}, "takes no argument 'arc'"),
        ({"optim_wrapper.optimizer.type": "AdamV"}, "'AdamV' is not a optimizer; did you mean"),
        ({"optim_wrapper.precision": "fp16"}, r"optim_wrapper\.precision 'fp16' is unknown"),
        ({"optim_wrapper.lr": {"visoin": 1e-5}}, "no parameter's name starts with 'visoin'"),
        ({"param_scheduler.warmup": 3}, "'CosineWarmup' takes no argument 'warmup'"),
        ({"train_cfg.max_iter": 3}, "'train_cfg' takes no argument 'max_iter'"),
        (
            {"train_cfg.max_iters": "3"},
            r"'train_cfg' needs max_iters: int or None, got '3' \(str\)",
        ),
        ({"train_dataset.balance": True}, "'EasyVQADataset' takes no argument 'balance'"),
    ],
)
def test_the_last_stages_mistakes_are_found_before_the_first_is_trained(
    tiny_options, tmp_path: Path, options: dict, message: str
) -> None:
    replaced = tuple(f"{key}." for key in options)  # options of what isn't there any more
    merged = {k: v for k, v in tiny_options.items() if not k.startswith(replaced)} | options
    with pytest.raises(ValueError, match=message):
        run(merged, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_architecture_known_to_files_alone_leaves_the_method_to_check(
    tiny_options, tmp_path: Path
) -> None:
    options = {**tiny_options, "model.llm.arch": None, "model.llm.weights": "someone/some-llm"}
    check_run(load_config("quickstart_covft", options))
    for wrong in (wrong_vft(type="LoRA", ranks=8), wrong_vft(type="CoVFT", num_experts=0)):
        with pytest.raises(ValueError, match=r"'ranks'|num_experts must be at least 1"):
            check_run(load_config("quickstart_covft", {**options, **wrong}))
    # Unknown too, but not for want of files.
    wrong = {"model.text_encoder.type": "Bert", "model.text_encoder.arch": None}
    wrong["model.text_encoder.weights"] = "someone/some-encoder"
    with pytest.raises(ValueError, match="'Bert' is not a text encoder"):
        check_run(load_config("quickstart_covft", {**tiny_options, **wrong}))


def test_what_the_meta_device_cannot_do_is_no_error(
    tiny_options, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ReadsValues(Full):
        def apply(self, tower) -> None:
            super().apply(tower)
            assert next(tower.backbone.parameters()).sum().item() is not None

    monkeypatch.setitem(VFT.module_dict, "ReadsValues", ReadsValues)
    with pytest.warns(UserWarning, match="couldn't be checked before training"):
        check_run(
            load_config("quickstart_covft", {**tiny_options, **wrong_vft(type="ReadsValues")})
        )


def test_checking_a_full_sized_recipe_allocates_nothing() -> None:
    check_run(load_config("llava15_7b_covft"))  # 7 B parameters in float32 would be 28 GB
    with pytest.raises(ValueError, match="first_block is 99"):
        check_run(load_config("llava15_7b_covft", {"model.vision.vft.first_block": 99}))
