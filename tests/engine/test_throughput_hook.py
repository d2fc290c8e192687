"""What is logged of a run's speed."""

import re
from types import SimpleNamespace

import pytest
import torch
from test_flops import BERT, LENGTH, METHODS, SAMPLES, TEXT, batch_for, build
from torch.utils.data import DataLoader, Dataset
from toy_training import ToyDataset, toy_dataloader, toy_runner

from covft.engine import Runner, ThroughputHook, throughput_hook
from covft.engine.flops import FlopModel, Work
from covft.engine.scalars_hook import read_scalars
from covft.models.mllm import MLLM

torch.set_num_threads(1)


class Batches(Dataset):
    """Hands out one batch, whatever it is asked for."""

    def __init__(self, model: MLLM, supervised: bool) -> None:
        self.batch = {**batch_for(model), "sample_ids": ["a", "b"], "bad_samples": []}
        if not supervised:
            self.batch["labels"] = torch.full_like(self.batch["labels"], -100)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return index


class Sampler:
    accumulation, world_size, steps_per_epoch, start_step = 2, 1, 4, 0
    step_size = 4

    def __iter__(self):
        while True:
            yield [0, 1]


def run_mllm(folder, method: str, supervised: bool = True, **logging) -> tuple[MLLM, list[dict]]:
    model = build(METHODS[method])
    data = Batches(model, supervised)
    loader = DataLoader(data, batch_sampler=Sampler(), collate_fn=lambda _: data.batch)
    runner = Runner.from_parts(
        model=model,
        dataloader=loader,
        train_cfg={"max_iters": 2, "accumulation": 2},
        optim_wrapper={"optimizer": {"type": "AdamW", "lr": 1e-3}, "precision": "fp32"},
        work_dir=folder,
        hooks=[ThroughputHook(**logging)],
    )
    runner.train()
    return model, read_scalars(folder / "scalars.jsonl")


def test_a_step_is_described(tmp_path):
    model, records = run_mllm(tmp_path, "CoVFT", peak_tflops=0.5)
    work = Work((LENGTH,) * SAMPLES, 10, (TEXT,) * SAMPLES, (TEXT,) * SAMPLES)
    flops = 2 * FlopModel(model).of(work).total
    assert BERT["num_hidden_layers"] == 2  # the text encoder is part of it
    for record in records:
        assert (record["samples"], record["images"]) == (2 * SAMPLES, 2 * SAMPLES)
        assert record["input_tokens"] == 2 * SAMPLES * LENGTH > record["tokens"] == 20
        for name in ("samples", "images", "input_tokens"):
            speed = record[f"{name}_per_second"]
            assert speed * record["seconds"] == pytest.approx(record[name])
        tflops = record["tflops_per_device"]
        assert tflops * 1e12 * record["seconds"] == pytest.approx(flops)
        assert record["mfu"] == pytest.approx(tflops / 0.5)
        assert record["data_share"] == pytest.approx(record["data_seconds"] / record["seconds"])
        assert 0.05 < record["peak_memory_gib"] < 64
        norms = [record[f"grad_norm/{part}"] for part in ("vision", "projector", "llm")]
        assert sum(norm**2 for norm in norms) == pytest.approx(record["grad_norm"] ** 2)
    log = (tmp_path / "train.log").read_text()
    assert re.search(r" \d+ tok/s  [\d.e+]+ samples/s  [\d.e-]+ TFLOP/s \(\d+% MFU\)  ", log)


def test_a_frozen_part_has_no_gradient_norm(tmp_path):
    _, records = run_mllm(tmp_path, "Freeze")
    assert "grad_norm/llm" in records[0] and "grad_norm/vision" not in records[0]
    # Nobody says what this CPU can do.
    assert "mfu" not in records[0] and "tflops_per_device" in records[0]


def test_a_model_that_cannot_be_counted_still_trains(tmp_path):
    toy_runner(tmp_path, max_iters=3).train()
    record = read_scalars(tmp_path / "scalars.jsonl")[0]
    assert "tflops_per_device" not in record and record["input_tokens_per_second"] > 0
    log = (tmp_path / "train.log").read_text()
    assert "TFLOP/s aren't logged: operations are counted of an MLLM, not of a ToyModel" in log


def test_skipped_steps_have_no_gradient_norms_but_throughput(tmp_path):
    class Unsupervised(ToyDataset):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return {**sample, "labels": torch.full_like(sample["labels"], -100)}

    toy_runner(tmp_path, max_iters=3, dataloader=toy_dataloader(Unsupervised())).train()
    record = read_scalars(tmp_path / "scalars.jsonl")[0]
    assert record["skipped"] == "no supervised token" and record["tokens"] == 0
    assert record["samples"] == 4 and record["samples_per_second"] > 0
    assert not [name for name in record if name.startswith("grad_norm/")]


def test_steps_that_compute_nothing_have_no_flops(tmp_path):
    _, records = run_mllm(tmp_path, "CoVFT", supervised=False, peak_tflops=0.5)
    for record in records:
        assert record["tokens"] == 0 and record["input_tokens_per_second"] > 0
        assert record["tflops_per_device"] == record["mfu"] == 0
    assert "0 TFLOP/s (0% MFU)" in (tmp_path / "train.log").read_text()


def test_figures_are_sums_over_all_processes(monkeypatch):
    reduced = []

    def all_reduce(tensor):
        reduced.append(tensor.clone())
        tensor.mul_(2)  # as if another process had the same batches

    monkeypatch.setattr(throughput_hook, "all_reduce", all_reduce)
    monkeypatch.setattr(throughput_hook, "get_world_size", lambda: 2)
    model = build(METHODS["Full"])
    norms = {"llm": 1.0}
    runner = SimpleNamespace(model=model, optim_wrapper=SimpleNamespace(module_norms=lambda: norms))
    hook = ThroughputHook()
    hook.before_train(runner)
    batch = {**batch_for(model), "sample_ids": ["a", "b"]}
    outputs = {"seconds": 2.0, "data_seconds": 0.5, "tokens": 20}
    hook.after_train_iter(runner, 0, data_batch=[batch, batch], outputs=outputs)
    assert len(reduced) == 1
    assert outputs["samples"] == 2 * 2 * SAMPLES and outputs["samples_per_second"] == 2 * SAMPLES
    assert outputs["input_tokens"] == 2 * 2 * SAMPLES * LENGTH
    # Two devices did twice the work: a device's speed is that of its own.
    own = 2 * FlopModel(model).of(Work.of(batch)).total
    assert outputs["tflops_per_device"] == pytest.approx(own / 2.0 / 1e12)
    assert outputs["data_share"] == 0.25 and outputs["grad_norm/llm"] == 1.0


def test_the_peak_of_a_gpu_is_looked_up(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    runner = SimpleNamespace(model=build(METHODS["Full"]))
    hook = ThroughputHook()
    hook.before_train(runner)
    assert hook.peak_tflops == 989
    given = ThroughputHook(peak_tflops=500)
    given.before_train(runner)
    assert given.peak_tflops == 500
    assert throughput_hook.peak_memory_bytes() == 3 * 2**30


def test_an_impossible_peak_is_refused():
    with pytest.raises(ValueError, match=r"logging.peak_tflops is what a device .* got 0"):
        ThroughputHook(peak_tflops=0)
