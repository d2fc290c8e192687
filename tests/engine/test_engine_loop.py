"""The training loop: what one step is, and steps that can't be used."""

import json
import math

import pytest
import torch
from mmengine.hooks import Hook
from toy_training import Loss, ToyDataset, ToyModel, exact_scalars, toy_dataloader, toy_runner

from covft.engine.scalars_hook import read_scalars

torch.set_num_threads(1)
SGD = {"optimizer": {"type": "SGD", "lr": 0.5}, "precision": "fp32"}


class RecordGradients(Hook):
    """Keeps the gradients of every step, before they are applied."""

    def __init__(self):
        self.steps = []

    def before_train(self, runner):
        wrapper = runner.optim_wrapper
        step = wrapper.step

        def recording_step():
            named = runner.model.named_parameters()
            self.steps.append({n: p.grad.clone() for n, p in named if p.grad is not None})
            step()

        wrapper.step = recording_step


def gradients(work_dir, batch_size, accumulation):
    recorder = RecordGradients()
    runner = toy_runner(
        work_dir,
        max_iters=3,
        model=ToyModel(dropout=0.0).double(),
        dataloader=toy_dataloader(batch_size=batch_size, accumulation=accumulation),
        optim_wrapper=SGD,
        train_cfg={"accumulation": accumulation},
        hooks=[recorder],
    )
    runner.train()
    return recorder.steps, read_scalars(work_dir / "scalars.jsonl")


def test_accumulation_weighs_every_token_the_same(tmp_path):
    one_batch, one_log = gradients(tmp_path / "a", 8, 1)
    accumulated, accumulated_log = gradients(tmp_path / "b", 1, 8)
    assert len(one_batch) == len(accumulated) == 3
    for ours, theirs in zip(one_batch, accumulated, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(one_log, accumulated_log, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-12)


def test_unequal_token_counts_make_that_test_a_test():
    counts = {int((ToyDataset()[i]["labels"][1:] != -100).sum()) for i in range(8)}
    assert len(counts) > 3


def test_length_in_epochs(tmp_path):
    runner = toy_runner(tmp_path, max_iters=None, train_cfg={"max_epochs": 2})
    assert (runner.max_iters, runner.max_epochs) == (20, 2)
    runner.train()
    assert (runner.iter, runner.epoch) == (20, 2)


@pytest.mark.parametrize(
    ("train_cfg", "message"),
    [
        ({"max_epochs": 1}, "either max_iters or max_epochs, got max_iters=12 and max_epochs=1"),
        ({"max_iters": None}, "got max_iters=None and max_epochs=None"),
        ({"max_iters": 0}, "at least 1"),
        ({"accumulation": 3}, "steps of 2 micro-batches, but train_cfg.accumulation is 3"),
        ({"max_iter": 3}, "takes no argument 'max_iter'; did you mean 'max_iters'"),
    ],
)
def test_lengths_that_make_no_sense_are_refused(tmp_path, train_cfg, message):
    with pytest.raises(ValueError, match=message):
        toy_runner(tmp_path, train_cfg=train_cfg)


def test_dataloader_of_another_number_of_processes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="built for 2 processes, but there are 1"):
        toy_runner(tmp_path, dataloader=toy_dataloader(world_size=2))


class SilentDataset(ToyDataset):
    """Has no supervised token in its first samples."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        sample["labels"][:] = -100
        return sample


def test_steps_without_supervised_tokens_change_nothing(tmp_path):
    model = ToyModel()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runner = toy_runner(tmp_path, model=model, dataloader=toy_dataloader(SilentDataset()))
    runner.train()
    assert runner.train_loop.skipped_steps == 12
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    record = read_scalars(tmp_path / "scalars.jsonl")[0]
    assert (record["loss"], record["tokens"]) == (None, 0)
    log = (tmp_path / "train.log").read_text()
    assert "step 1: no supervised token, so no update (samples s" in log
    assert "12 such steps so far" in log


class FailingModel(ToyModel):
    """Returns a loss that isn't finite in the given calls."""

    def __init__(self, calls):
        super().__init__()
        self.failing = calls

    def forward(self, **batch):
        output = super().forward(**batch)
        factor = math.nan if int(self.calls) in self.failing else 1.0
        return Loss(output.loss_sum * factor, output.num_tokens)


def test_non_finite_steps_are_skipped_and_counted(tmp_path):
    model = FailingModel(calls={3, 8})  # a micro-batch of step 2, and one of step 4
    runner = toy_runner(tmp_path, model=model)
    runner.train()
    assert runner.train_loop.bad_steps == 2
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    records = read_scalars(tmp_path / "scalars.jsonl")
    assert [r["step"] for r in records if r["loss"] is None] == [2, 4]
    assert all(json.loads(line) for line in exact_scalars(tmp_path))
    steps_done = runner.optim_wrapper.optimizer.state[model.llm.weight]["step"]
    assert int(steps_done) == 10


def test_too_many_non_finite_steps_in_a_row_end_the_run(tmp_path):
    model = FailingModel(calls=range(5, 100))
    runner = toy_runner(tmp_path, model=model, train_cfg={"max_bad_steps": 3})
    with pytest.raises(RuntimeError, match=r"step 5: loss nan.*3 in a row.*optim_wrapper"):
        runner.train()


def test_a_good_step_ends_a_row_of_bad_ones(tmp_path):
    model = FailingModel(calls={1, 3, 7, 9})
    toy_runner(tmp_path, model=model, train_cfg={"max_bad_steps": 3}).train()


def test_bad_samples_are_listed_once_and_training_goes_on(tmp_path):
    dataset = ToyDataset(size=8, bad=(2, 5))
    runner = toy_runner(tmp_path, dataloader=toy_dataloader(dataset))
    runner.train()  # six passes over the data
    lines = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == ["s2", "s5"]
    assert {line["reason"] for line in lines} == {"truncated image"}
    assert "2 samples were left out of the training" in (tmp_path / "train.log").read_text()
    assert len(read_scalars(tmp_path / "scalars.jsonl")) == 12


def test_micro_batches_of_bad_samples_alone_are_left_out(tmp_path):
    dataset = ToyDataset(size=4, bad=(0, 1, 2))
    toy_runner(tmp_path, max_iters=3, dataloader=toy_dataloader(dataset)).train()
    records = read_scalars(tmp_path / "scalars.jsonl")
    assert all(record["tokens"] == records[0]["tokens"] > 0 for record in records)


def test_a_model_that_counts_other_tokens_is_a_bug(tmp_path):
    class Miscounting(ToyModel):
        def forward(self, **batch):
            output = super().forward(**batch)
            return Loss(output.loss_sum, output.num_tokens + 1)

    with pytest.raises(AssertionError, match="the model supervised"):
        toy_runner(tmp_path, model=Miscounting()).train()


class WithAuxiliary(ToyModel):
    """Adds a term to the loss: the mean over the micro-batch's samples of a weight's square."""

    def forward(self, **batch):
        output = super().forward(**batch)
        return Loss(output.loss_sum, output.num_tokens, 0.1 * self.projector.weight.square().sum())


def test_an_auxiliary_loss_is_added_and_logged_apart(tmp_path):
    logs, steps = {}, {}
    for name, kind in (("plain", ToyModel), ("auxiliary", WithAuxiliary)):
        recorder = RecordGradients()
        toy_runner(
            tmp_path / name,
            max_iters=1,
            model=kind(dropout=0.0).double(),
            dataloader=toy_dataloader(batch_size=2, accumulation=4),
            optim_wrapper=SGD,
            param_scheduler=None,
            train_cfg={"accumulation": 4},
            hooks=[recorder],
        ).train()
        steps[name] = recorder.steps[0]
        (logs[name],) = read_scalars(tmp_path / name / "scalars.jsonl")
    weight = ToyModel().double().projector.weight.detach()
    difference = steps["auxiliary"]["projector.weight"] - steps["plain"]["projector.weight"]
    torch.testing.assert_close(difference, 0.2 * weight, rtol=1e-10, atol=1e-12)
    assert logs["auxiliary"]["loss"] == pytest.approx(logs["plain"]["loss"], rel=1e-12)
    expected = 0.1 * weight.square().sum().item()
    assert logs["auxiliary"]["auxiliary_loss"] == pytest.approx(expected, rel=1e-10)
    assert "auxiliary_loss" not in logs["plain"]


def test_autocast_is_for_the_forward_alone(tmp_path):
    seen = []

    class Watched(torch.autograd.Function):
        """Notes in which passes autocast is on."""

        @staticmethod
        def forward(ctx, x):
            seen.append(("forward", torch.is_autocast_enabled("cpu")))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(("backward", torch.is_autocast_enabled("cpu")))
            return grad

    class WatchedModel(ToyModel):
        def forward(self, **batch):
            loss = super().forward(**batch)
            return Loss(Watched.apply(loss.loss_sum), loss.num_tokens)

    toy_runner(
        tmp_path, model=WatchedModel(), max_iters=3, optim_wrapper={**SGD, "precision": "bf16"}
    ).train()
    assert seen == [("forward", True), ("backward", False)] * 6
