"""What a run shows and writes beside its checkpoints."""

import logging
import re
import sys
import types

import pytest
import torch
from mmengine.hooks import Hook
from toy_training import ToyModel, exact_scalars, toy_runner

from covft.engine import CheckpointHook, ProgressHook, SampleLogHook
from covft.engine.scalars_hook import read_scalars

torch.set_num_threads(1)


def test_log_has_one_line_per_interval(tmp_path):
    toy_runner(tmp_path, hooks=[{"type": "ProgressHook", "interval": 5}]).train()
    log = (tmp_path / "train.log").read_text()
    lines = [line for line in log.splitlines() if "INFO - step" in line]
    assert [re.search(r"step +(\d+)/12", line)[1] for line in lines] == ["5", "10", "12"]
    number = r"[\d.e+-]+"
    assert re.search(
        rf"loss {number}  grad {number}  lr {number}  \d+ tok/s  {number} samples/s  {number} GiB  "
        rf"{number} s/step \(data \d+%\)  "
        r"ETA \d+:\d\d:\d\d$",
        lines[0],
    )
    losses = [record["loss"] for record in read_scalars(tmp_path / "scalars.jsonl")]
    assert f"loss {sum(losses[5:10]) / 5:.4f}" in lines[1]
    assert len(log.splitlines()) < 12


def test_log_tells_the_plan(tmp_path):
    groups = {"optimizer": {"type": "AdamW", "lr": 1e-2}, "lr": {"vision": 1e-3}}
    toy_runner(tmp_path, optim_wrapper={**groups, "precision": "fp32"})
    log = (tmp_path / "train.log").read_text()
    assert (
        "12 steps on 1 x cpu, strategy single, precision fp32; 313 of 449 parameters are trained"
        in log
    )
    assert "group vision: 88 parameters, peak lr 0.001" in log
    assert "2 warm-up steps from 0.333 of the peak" in log


def test_learning_rates_of_groups_are_logged_by_name(tmp_path):
    groups = {"optimizer": {"type": "AdamW", "lr": 1e-2, "weight_decay": 0.1}}
    every_3 = {"type": "ProgressHook", "interval": 3}
    groups["lr"] = {"vision": 1e-3}
    toy_runner(tmp_path, optim_wrapper=groups, hooks=[every_3]).train()
    record = read_scalars(tmp_path / "scalars.jsonl")[2]
    assert (record["lr/base"], record["lr/vision"]) == (1e-2, 1e-3)
    assert "lr/vision 1.00e-03  lr/base 1.00e-02" in (tmp_path / "train.log").read_text()


def test_bar_on_a_terminal_replaces_the_lines_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    toy_runner(tmp_path, hooks=[{"type": "ProgressHook", "interval": 5}]).train()
    shown = capsys.readouterr()
    assert " step  5/12" not in shown.out + shown.err
    assert re.search(r"12/12.* ETA 0:00:00  loss \d\.\d{3}  lr \S+  \d+ tok/s", shown.err)
    assert "saved iter_12.pth" in shown.out + shown.err
    assert " step  5/12" in (tmp_path / "train.log").read_text()


def test_bar_gives_the_terminal_back_after_an_error(tmp_path, monkeypatch):
    class Fail(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            raise OSError("disk full")

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    before = sys.stdout
    runner = toy_runner(tmp_path, hooks=[Fail()])
    with pytest.raises(OSError, match="disk full"):
        runner.train()
    assert sys.stdout is before
    stream = next(h for h in runner.logger.handlers if type(h) is logging.StreamHandler)
    assert not any(f.__class__ is types.FunctionType for f in stream.filters)


def test_loss_curve_is_a_picture(tmp_path):
    toy_runner(tmp_path).train()
    assert (tmp_path / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_folder_holds_what_is_documented_and_nothing_else(tmp_path):
    toy_runner(tmp_path).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iter_12.pth",
        "last_checkpoint",
        "loss_curve.png",
        "scalars.jsonl",
        "train.log",
        "weights.safetensors",
    ]


def test_failed_save_leaves_no_half_file(tmp_path, monkeypatch):
    def full_disk(state, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    runner = toy_runner(tmp_path)
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        runner.train()
    assert not list(tmp_path.glob("*.pth")) and not list(tmp_path.glob(".*"))


def test_preview_is_logged_and_changes_nothing(tmp_path):
    seen = []

    def preview(model):
        assert not torch.is_grad_enabled()
        seen.append(model.training or model.vision.training)
        return [f"Q: colour? A: {torch.rand(1).item():.3f}", "two\nlines"]

    toy_runner(tmp_path / "without").train()
    frozen_part = ToyModel()
    modes = []

    class KeepEval(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if batch_idx == 0:
                runner.model.llm.eval()
            modes.append((runner.model.llm.training, runner.model.dropout.training))

    hooks = [SampleLogHook(preview=preview, interval=4, sample_index=3), KeepEval()]
    toy_runner(tmp_path / "with", model=frozen_part, hooks=hooks).train()
    assert seen == [False] * 4
    assert set(modes) == {(False, True)}
    assert exact_scalars(tmp_path / "with") == exact_scalars(tmp_path / "without")
    log = (tmp_path / "with/train.log").read_text()
    assert "training sample 3:\n    question 3 [[answer 3]]" in log
    assert "generations after 0 steps:\n    Q: colour? A:" in log
    assert "generations after 12 steps:" in log
    assert "    two\n    lines" in log


@pytest.mark.parametrize("settings", [{"interval": 5}, {"interval": 0, "preview": print}])
def test_preview_settings_that_would_be_ignored_are_refused(settings):
    with pytest.raises(ValueError, match="needs a preview"):
        SampleLogHook(**settings)


def test_intervals_below_one_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        ProgressHook(interval=0)
    with pytest.raises(ValueError, match="at least 1"):
        CheckpointHook(max_keep=0)


def test_misspelt_hook_is_explained(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'CheckpointHook'"):
        toy_runner(tmp_path, hooks=[{"type": "ChekpointHook"}])


def test_tensorboard_gets_the_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    backends = {"vis_backends": [{"type": "TensorboardVisBackend"}]}
    toy_runner(tmp_path, visualizer=backends).train()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "vis_data"))
    events.Reload()
    values = [(event.step, event.value) for event in events.Scalars("train/loss")]
    losses = [(r["step"], r["loss"]) for r in read_scalars(tmp_path / "scalars.jsonl")]
    assert [step for step, _ in values] == list(range(1, 13))
    assert [v for _, v in values] == pytest.approx([v for _, v in losses], rel=1e-6)


def test_missing_backend_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="WandbVisBackend needs the package 'wandb'"):
        toy_runner(tmp_path, visualizer={"vis_backends": [{"type": "WandbVisBackend"}]})


def test_misspelt_visualizer_is_explained(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'TensorboardVisBackend'"):
        toy_runner(tmp_path, visualizer={"vis_backends": [{"type": "TensorBoardBackend"}]})
    with pytest.raises(ValueError, match="visualizer must be"):
        toy_runner(tmp_path, visualizer={"backends": []})


def test_runs_of_one_process_do_not_share_mmengine_globals(tmp_path):
    first = toy_runner(tmp_path / "same")
    second = toy_runner(tmp_path / "same")
    assert first.message_hub is not second.message_hub
    assert first.logger is not second.logger
