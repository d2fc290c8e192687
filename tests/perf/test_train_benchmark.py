"""The benchmark of training steps, at tiny size."""

import argparse
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from covft.conversation import IMAGE_TOKEN_ID
from covft.perf import train
from covft.perf.contenders import Contenders, method_configs
from covft.perf.step_timer import StepTimer, TimedOptimWrapper
from covft.perf.synthetic import (
    MEAN_TEXT_TOKENS,
    TEXT_ONLY_SHARE,
    draw_shapes,
    random_model,
    shrunk,
    synthetic_loader,
)
from covft.perf.timing import json_line
from covft.registry import VFT

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compares CPU runs")
torch.set_num_threads(1)

CPU = torch.device("cpu")
MODEL = dict(
    type="MLLM",
    vision=dict(backbone=dict(type="CLIP", arch={"depth": 3}), vft=dict(type="Freeze")),
    projector=dict(type="MLPProjector"),
    llm=dict(type="Vicuna", arch="7b"),
    text_encoder=dict(type="TextEncoder", arch="bert-base-uncased"),
)


def run(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    tiny = ["--shrink", "--device", "cpu", "--steps", "2", "--warmup", "1", "--threads", "1"]
    return train.run(parser.parse_args(["llava15_7b_covft", *tiny, *arguments]))


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return run("--methods", "covft", "Full", "--peak-tflops", "0.5")


def test_methods_are_measured_on_the_same_batches(result) -> None:
    assert list(result["methods"]) == ["CoVFT", "Full"]
    batch = result["batch"]
    assert batch["samples"] == 4 and batch["positions"] >= batch["input_tokens"] > 0
    for found in result["methods"].values():
        assert found["steps"] == 2 == len(found["seconds_of_steps"])
        speeds = [4 / seconds for seconds in found["seconds_of_steps"]]
        assert found["samples_per_second"] == pytest.approx(sum(speeds) / 2)
        assert found["seconds"] == pytest.approx(sum(found["seconds_of_steps"]) / 2)
        assert found["input_tokens_per_second"] > found["samples_per_second"]
        assert found["mfu"] == pytest.approx(found["tflops"] / 0.5)
        assert sum(found["shares"].values()) == pytest.approx(1, abs=0.05)
        assert found["tflop_per_step"] > 0
        assert min(found["shares"][part] for part in ("forward", "backward", "optimizer")) > 0
        assert found["loss"] == pytest.approx(5.5, abs=0.5)  # log 256
        assert found["peak_gib"] is None
    covft, full = result["methods"]["CoVFT"], result["methods"]["Full"]
    assert covft["tflop_per_step"] > full["tflop_per_step"]
    ratio = result["ratios"]["CoVFT / Full"]["step time"]
    assert ratio["numerator"] == covft["seconds"] and ratio["denominator"] == full["seconds"]
    assert ratio["ratio"] == pytest.approx(covft["seconds"] / full["seconds"])


def test_result_is_one_line_with_its_conditions(result) -> None:
    line = json_line(result)
    assert "\n" not in line
    read = json.loads(line)
    assert read["benchmark"] == "train" and read["settings"]["packed"] is False
    assert {"precision", "optimizer", "compile", "torch", "peak_tflops"} <= read[
        "conditions"
    ].keys()
    text = train.table(read)
    for word in ("CoVFT / Full, step time", "MFU", "input_tokens", "optimizer: AdamW", "forward"):
        assert word in text


def test_a_packed_step_has_no_padding() -> None:
    packed = run(
        "--methods", "Freeze", "--cfg-options", "train_dataloader.pack=True", "--samples", "6"
    )
    assert packed["settings"]["packed"] and packed["batch"]["samples"] == 6
    assert packed["settings"]["accumulation"] == 3
    assert packed["batch"]["positions"] == packed["batch"]["input_tokens"]
    assert packed["ratios"] == {}


def test_a_slow_step_moves_none_of_a_rows_figures(monkeypatch) -> None:
    figures = train._Bench._figures
    bench = SimpleNamespace(timer=StepTimer(CPU), peak=1.0)
    for seconds, forward in ((1.0, 0.5), (1.0, 0.5), (10.0, 9.0)):
        bench.timer.start("a")
        bench.timer._steps["a"][-1].append(("forward", 0.0, forward * seconds))
    measured = train._Measured(seconds=[1.0, 1.0, 10.0], tflop=[0.5, 0.5, 0.5])
    step = {"samples": 4.0, "input_tokens": 100.0, "images": 3.0}
    row = figures(bench, "a", measured, [step] * 3)
    assert row["seconds"] == 1 and row["samples_per_second"] == 4 and row["tflops"] == 0.5
    assert row["input_tokens_per_second"] == 100 and row["images_per_second"] == 3
    assert row["mfu"] == 0.5 and row["tflop_per_step"] == 0.5
    assert row["shares"]["forward"] == 0.5 == row["shares"]["other"]


def test_time_ends_the_rounds_and_the_warm_up(monkeypatch) -> None:
    from covft.engine.loop import TrainLoop

    updates = []
    update = TrainLoop._update
    monkeypatch.setattr(
        TrainLoop, "_update", lambda loop, step: updates.append(1) or update(loop, step)
    )
    arguments = ("--methods", "Freeze", "--steps", "50", "--warmup", "30")
    short = run(*arguments, "--seconds", "0.001")
    assert short["methods"]["Freeze"]["steps"] == 1
    assert len(updates) == 2, "one step of warm-up, one that counts"


def test_every_finished_step_is_in_a_file(tmp_path, monkeypatch) -> None:
    from covft.engine.loop import TrainLoop

    updates = []
    update = TrainLoop._update

    def killed(loop: TrainLoop, batches: Any) -> Any:
        updates.append(1)
        if len(updates) > 3:
            raise KeyboardInterrupt
        return update(loop, batches)

    monkeypatch.setattr(TrainLoop, "_update", killed)
    partial = tmp_path / "partial.json"
    with pytest.raises(KeyboardInterrupt):
        run("--methods", "Freeze", "--steps", "5", "--partial", str(partial))
    found = json.loads(partial.read_text())
    assert found["methods"]["Freeze"]["steps"] == 2
    assert "optimizer: AdamW" in train.table(found)


def test_a_method_that_runs_out_of_memory_leaves_the_others(monkeypatch) -> None:
    from covft.engine.loop import TrainLoop

    update = TrainLoop._update

    def fail(loop: TrainLoop, batches: Any) -> Any:
        if type(loop.runner.model.vision.vft).__name__ == "Full":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return update(loop, batches)

    monkeypatch.setattr(TrainLoop, "_update", fail)
    found = run("--methods", "Full", "Freeze")
    assert found["methods"]["Full"] == {"error": "out of memory: CUDA out of memory"}
    assert found["methods"]["Freeze"]["steps"] == 2 and found["ratios"] == {}
    assert "out of memory" in train.table(found)


def test_impossible_settings_are_explained() -> None:
    with pytest.raises(ValueError, match=r"--methods Ful: no such method; did you mean 'Full'"):
        run("--methods", "Ful")
    with pytest.raises(ValueError, match=r"--samples 5 must be a multiple of the batch size, 2"):
        run("--samples", "5")
    with pytest.raises(ValueError, match=r"--stage first: the config's stages are pretrain"):
        run("--stage", "first")
    with pytest.raises(ValueError, match=r"--steps must be at least 1"):
        run("--steps", "0")
    with pytest.raises(ValueError, match=r"finds no CUDA device"):
        run("--device", "cuda")


def test_the_recipes_own_method_keeps_its_options() -> None:
    own = dict(type="CoVFT", num_experts=2)
    configs = method_configs(["full", "COVFT"], own)
    assert configs == {
        "Full": {"type": VFT.get("Full")},
        "CoVFT": {"type": VFT.get("CoVFT"), "num_experts": 2},
    }


def test_contenders_share_all_but_the_tower() -> None:
    methods = method_configs(["Freeze", "CoVFT", "QMoE"], {})
    contenders = Contenders(shrunk(MODEL), methods, device=CPU)
    model = contenders.model
    assert model.text_encoder is not None
    head = model.llm.model.get_output_embeddings().weight
    for name in methods:
        contenders.choose(name)
        assert type(model.vision.vft).__name__ == name
        assert model.llm.model.get_output_embeddings().weight is head
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(set(names)) == len({id(p) for p in model.parameters()})


def test_lengths_are_those_of_the_mix() -> None:
    shapes = draw_shapes(20_000, seed=0)
    mean = sum(shape.text for shape in shapes) / len(shapes)
    assert mean == pytest.approx(MEAN_TEXT_TOKENS, rel=0.03)
    text_only = sum(shape.images == 0 for shape in shapes) / len(shapes)
    assert text_only == pytest.approx(TEXT_ONLY_SHARE, abs=0.005)
    assert max(shape.text for shape in shapes) <= 1472
    assert all(0 < shape.supervised < shape.text and shape.context >= 2 for shape in shapes)
    assert draw_shapes(5, seed=1) == draw_shapes(5, seed=1) != draw_shapes(5, seed=2)


@pytest.mark.parametrize("pack", [False, True])
def test_synthetic_batches_are_what_a_model_takes(pack) -> None:
    model = random_model(
        {**shrunk(MODEL), "vision": {**shrunk(MODEL)["vision"], "vft": dict(type="CoVFT")}},
        device=CPU,
    )
    shapes = draw_shapes(8, seed=0, scale=0.05)
    loader = synthetic_loader(model, shapes, batch_size=4, accumulation=2, group="none", pack=pack)
    batch = next(iter(loader))
    assert ("cu_seqlens" in batch) == pack
    images = len(batch["pixel_values"])
    assert (batch["input_ids"] == IMAGE_TOKEN_ID).sum() == images * model.num_image_tokens
    del batch["bad_samples"]
    output = model(**batch)
    output.loss_sum.backward()
    assert output.num_tokens > 0 and model.vision.backbone.blocks[-1].mlp.experts.up.grad.any()


@pytest.mark.parametrize("llm", [dict(type="Phi3", arch="mini-4k"), dict(type="Vicuna", arch="7b")])
def test_every_family_shrinks(llm) -> None:
    cfg = shrunk({**MODEL, "llm": {**llm, "weights": "pretrained"}})
    assert sum(p.numel() for p in random_model(cfg, device=CPU).parameters()) < 1e6


def test_parts_of_a_step_are_timed() -> None:
    calls = []

    class Wrapper:
        precision = "fp32"

        def backward(self, loss: torch.Tensor) -> None:
            calls.append("backward")

        def clip_gradients(self) -> torch.Tensor:
            return torch.ones(())

        def step(self) -> None:
            calls.append("step")

        def zero_grad(self) -> None:
            calls.append("zero_grad")

    timer = StepTimer(CPU)
    layer = torch.nn.Linear(2, 2)
    timer.watch_forward(layer)
    wrapper = TimedOptimWrapper(Wrapper(), timer)
    for name in (None, "a"):
        timer.start(name)
        wrapper.backward(layer(torch.ones(2)).sum())
        assert wrapper.clip_gradients() == 1 and wrapper.precision == "fp32"
        wrapper.step()
        wrapper.zero_grad()
    assert calls == ["backward", "step", "zero_grad"] * 2
    shares = timer.shares("a", [100.0])
    assert all(shares[part] > 0 for part in ("forward", "backward", "optimizer"))
    assert shares["other"] == pytest.approx(1, abs=0.01)
