"""Training steps of a recipe by VFT method: time, samples and tokens a second, MFU, peak memory.

The engine's own step (sampler, collator, loop, optimizer), on made-up samples of real lengths and
a model of real size with random weights. Methods take turns on the same batches in one process;
they share the LLM and its optimizer state, see :mod:`covft.perf.contenders`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from mmengine.config import Config, DictAction
from torch.utils.data import DataLoader

from covft.atomic import atomic_write_text
from covft.config import load_config, stage_configs
from covft.engine.compile import compile_blocks
from covft.engine.flops import FlopModel, Work, peak_tflops
from covft.engine.runner import Runner
from covft.models.mllm import MLLM
from covft.perf.arguments import add_conditions
from covft.perf.contenders import Contenders, method_configs
from covft.perf.step_timer import StepTimer, TimedOptimWrapper
from covft.perf.synthetic import draw_shapes, shrunk, synthetic_loader
from covft.perf.timing import check_device, conditions, json_line, num_threads, synchronise

#: With --shrink: samples of a micro-batch, micro-batches of a step, and factor on the lengths.
_TINY_BATCH, _TINY_ACCUMULATION, _TINY_LENGTHS = 2, 2, 0.05
_KEEP_TIME_FOR = 1.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    parser.add_argument("config", help="a config file, or the name of one under configs/")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["CoVFT", "Full", "Freeze"],
        help="VFT methods; the recipe's own keeps its options",
    )
    parser.add_argument("--stage", help="a stage's name; by default the last one")
    parser.add_argument("--steps", type=int, default=5, help="steps of each method")
    parser.add_argument("--warmup", type=int, default=2, help="steps before, not counted")
    parser.add_argument(
        "--seconds",
        type=float,
        help="stop measuring when so many have passed, half of them at most for the warm-up; one "
        "step of each at least, and one before that isn't counted if there is a warm-up",
    )
    parser.add_argument(
        "--partial", type=Path, help="a file for the result so far, written after every step"
    )
    parser.add_argument("--batch-size", type=int, help="instead of the recipe's")
    parser.add_argument(
        "--samples", type=int, help="of a step, by fewer micro-batches than the recipe's"
    )
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE")
    parser.add_argument("--peak-tflops", type=float, help="of the device, instead of the table's")
    add_conditions(parser, threads=torch.get_num_threads(), device="cuda")
    parser.add_argument(
        "--shrink", action="store_true", help="a tiny model: the same path, in seconds on a CPU"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the command line asks for.

    Returns:
        ``batch``: what the counted steps hold, on average. ``methods``: by method, each the median
        of the counted steps' values, ``seconds`` a step, ``samples_per_second``,
        ``input_tokens_per_second``, ``images_per_second``, ``tflop_per_step`` (model FLOPs, see
        :class:`~covft.engine.flops.FlopModel`), ``tflops`` a second, ``mfu`` (None without a known
        peak) and ``shares`` of the time; the largest ``peak_gib``, and ``resident_gib`` (None on a
        CPU), ``steps``, ``seconds_of_steps`` and the last ``loss``; or ``error``. ``ratios``: of
        each method to the others that ran.

    Raises:
        ValueError: If the recipe can't run so, or the device isn't there.
    """
    check_device(args.device, instead="--device cpu --shrink")
    if args.device == "cpu" and torch.cuda.is_available():
        raise ValueError("--device cpu, but a GPU is there; hide it: CUDA_VISIBLE_DEVICES=")
    if args.steps < 1 or args.warmup < 0:
        raise ValueError(f"--steps must be at least 1, --warmup 0; got {args.steps}, {args.warmup}")
    with num_threads(args.threads), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        bench = _Bench(args, Path(folder))
        stated = {
            "benchmark": "train",
            "settings": bench.settings,
            "conditions": {**conditions(bench.device), **bench.conditions},
        }
        result: dict[str, Any] = stated
        rounds = bench.measure(steps=args.steps, warmup=args.warmup, seconds=args.seconds)
        for measured in rounds:
            result = {**stated, **measured}
            if args.partial is not None:
                atomic_write_text(args.partial, json_line(result) + "\n")
    return result


def table(result: dict[str, Any]) -> str:
    """Return a result of :func:`run` as text."""
    lines = [
        f"{key}: {value}" for key, value in (result["settings"] | result["conditions"]).items()
    ]
    lines.append("a step: " + ", ".join(f"{v:.5g} {k}" for k, v in result["batch"].items()))
    head = ("method", "s/step", "samples/s", "tok/s", "TFLOP/s", "MFU", "peak GiB")
    lines += ["", f"{head[0]:<10}" + "".join(f"{name:>11}" for name in head[1:]) + "  shares"]
    for name, found in result["methods"].items():
        if "error" in found:
            lines.append(f"{name:<10} {found['error']}")
            continue
        numbers = (
            f"{found['seconds']:.4g}",
            f"{found['samples_per_second']:.4g}",
            f"{found['input_tokens_per_second']:.5g}",
            f"{found['tflops']:.4g}",
            "-" if found["mfu"] is None else f"{found['mfu']:.1%}",
            "-" if found["peak_gib"] is None else f"{found['peak_gib']:.4g}",
        )
        shares = ", ".join(f"{part} {share:.0%}" for part, share in found["shares"].items())
        lines.append(f"{name:<10}" + "".join(f"{n:>11}" for n in numbers) + f"  {shares}")
    for name, ratio in result["ratios"].items():
        for quantity, value in ratio.items():
            lines.append(
                f"{name}, {quantity}: {value['ratio']:.3f} = {value['numerator']:.4g} / "
                f"{value['denominator']:.4g}"
            )
    return "\n".join(lines)


@dataclass
class _Measured:
    """What the counted steps of a method gave."""

    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    resident: int = 0
    tflop: list[float] = field(default_factory=list)
    loss: float = float("nan")
    error: str = ""


class _Bench:
    """A recipe's stage as it would be trained, with towers to swap and made-up samples."""

    def __init__(self, args: argparse.Namespace, work_dir: Path) -> None:
        self.device = torch.device(args.device)
        stage = _stage(args)
        methods = method_configs(args.methods, stage.model.vision.get("vft") or {})
        model_cfg = stage.to_dict()["model"]
        if args.shrink:
            model_cfg = shrunk(model_cfg)
        self.contenders = Contenders(model_cfg, methods, device=self.device)
        model = self.contenders.model
        compiling = _compile_setting(stage, shrink=args.shrink)
        for name in reversed(methods):  # the first stays: its learning rates are the recipe's
            self.contenders.choose(name)
            compile_blocks(model, compiling)
        self.peak = args.peak_tflops
        if self.peak is None and args.device == "cuda":
            self.peak = peak_tflops(torch.cuda.get_device_name())
        self.dataloader = _dataloader(args, stage, model)
        sampler: Any = self.dataloader.batch_sampler
        self._sampler = sampler
        with redirect_stdout(sys.stderr):  # the run's log
            self.runner = Runner.from_parts(
                model=model,
                dataloader=self.dataloader,
                train_cfg={"max_iters": 1, "accumulation": self._sampler.accumulation},
                optim_wrapper=stage.optim_wrapper,
                work_dir=work_dir,
            )
        self.optimizer = self.runner.optim_wrapper.optimizer
        self.timer = StepTimer(self.device)
        self.timer.watch_forward(self.runner.model)
        self.runner.optim_wrapper = TimedOptimWrapper(self.runner.optim_wrapper, self.timer)
        self.settings = {
            "config": args.config,
            "methods": list(methods),
            "accumulation": self._sampler.accumulation,
            "batch_size": self._sampler.batch_size,
            "packed": bool(stage.train_dataloader.get("pack")),
            "warmup": args.warmup,
            "shrunk": args.shrink,
        }
        self.conditions = {
            "precision": self.runner.strategy.precision,
            "parameters": str(next(model.llm.parameters()).dtype).removeprefix("torch."),
            "optimizer": type(self.optimizer).__name__,
            "compile": compiling,
            "llm_checkpointing": model_cfg["llm"].get("checkpointing", False),
            "vision_checkpointing": model_cfg["vision"]["backbone"].get("checkpointing", False),
            "peak_tflops": self.peak,
        }

    def measure(
        self, *, steps: int, warmup: int, seconds: float | None
    ) -> Iterator[dict[str, Any]]:
        """Run the steps; yield the result so far after each that counts, see :func:`run`."""
        stream = iter(self.dataloader)
        found = {name: _Measured() for name in self.settings["methods"]}
        batches: list[list[dict[str, Any]]] = []
        self.runner.model.train()
        self.contenders.send_away()
        started = time.perf_counter()
        number = -warmup
        while number < steps:
            began = time.perf_counter()
            counted = number >= 0
            step = [next(stream) for _ in range(self._sampler.accumulation)]
            if counted:
                batches.append(step)
            for name, measured in found.items():
                if not measured.error:
                    self._step(name, step, measured, counted=counted)
            number += 1
            now = time.perf_counter()
            left = None if seconds is None else seconds - (now - started)
            if counted:
                yield self._result(found, batches)
                if left is not None and left < _KEEP_TIME_FOR * (now - began):
                    break
            elif seconds is not None and now - started > seconds / 2:
                number = 0

    def _step(
        self, name: str, batches: list[dict[str, Any]], measured: _Measured, *, counted: bool
    ) -> None:
        self.contenders.choose(name, self.optimizer)
        self.timer.start(name if counted else None)
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            measured.resident = torch.cuda.memory_allocated()
        synchronise(self.device)
        began = time.perf_counter()
        try:
            outputs = self.runner.train_loop._update(batches)
            synchronise(self.device)
        except torch.OutOfMemoryError as error:
            measured.error = f"out of memory: {str(error).partition('.')[0]}"
            self.runner.optim_wrapper.zero_grad()
            torch.cuda.empty_cache()
            return
        if counted:
            measured.seconds.append(time.perf_counter() - began)
            measured.loss = outputs["loss"]
            flops = FlopModel(self.contenders.model)
            works = [Work.of(batch) for batch in batches]
            measured.tflop.append(sum(flops.of(work).total for work in works) / 1e12)
            if on_gpu:
                measured.peaks.append(torch.cuda.max_memory_allocated())

    def _result(
        self, found: Mapping[str, _Measured], steps: Sequence[Sequence[dict[str, Any]]]
    ) -> dict[str, Any]:
        totals = [_totals(step) for step in steps]
        methods = {
            name: {"error": measured.error}
            if measured.error
            else self._figures(name, measured, totals)
            for name, measured in found.items()
        }
        return {
            "batch": {key: mean(step[key] for step in totals) for key in totals[0]},
            "methods": methods,
            "ratios": _ratios({k: v for k, v in methods.items() if "error" not in v}),
        }

    def _figures(
        self, name: str, measured: _Measured, totals: Sequence[Mapping[str, float]]
    ) -> dict[str, Any]:
        seconds = measured.seconds
        tflops = _median_rate(measured.tflop, seconds)
        return {
            "seconds": median(seconds),
            "seconds_of_steps": list(seconds),
            **{
                f"{key}_per_second": _median_rate([step[key] for step in totals], seconds)
                for key in ("samples", "input_tokens", "images")
            },
            "tflop_per_step": median(measured.tflop),
            "tflops": tflops,
            "mfu": None if self.peak is None else tflops / self.peak,
            "peak_gib": max(measured.peaks) / 2**30 if measured.peaks else None,
            "resident_gib": measured.resident / 2**30 if measured.peaks else None,
            "shares": self.timer.shares(name, seconds),
            "steps": len(measured.seconds),
            "loss": measured.loss,
        }


def _stage(args: argparse.Namespace) -> Config:
    stages = dict(stage_configs(load_config(args.config, args.cfg_options)))
    name = args.stage or list(stages)[-1]
    if name not in stages:
        raise ValueError(f"--stage {name}: the config's stages are {', '.join(stages)}")
    return stages[name]


def _compile_setting(stage: Config, *, shrink: bool) -> Any:
    """Return the recipe's ``compile``; shrunk with a backend that needs no compiler."""
    setting = stage.to_dict().get("compile") or False
    if not setting or not shrink:
        return setting
    options = dict(setting) if isinstance(setting, dict) else {}
    options.pop("mode", None)
    return {**options, "backend": "aot_eager"}


def _dataloader(args: argparse.Namespace, stage: Config, model: MLLM) -> DataLoader[Any]:
    """Return the recipe's loader over made-up samples."""
    cfg = stage.train_dataloader
    batch_size, accumulation = cfg.batch_size, stage.train_cfg.get("accumulation", 1)
    if args.shrink:
        batch_size, accumulation = _TINY_BATCH, _TINY_ACCUMULATION
    batch_size = args.batch_size or batch_size
    if args.samples is not None:
        accumulation = _accumulation(args.samples, batch_size)
    shapes = draw_shapes(
        (args.steps + args.warmup) * batch_size * accumulation,
        seed=0,
        max_text=stage.train_dataset.get("max_length", 2048) - model.num_image_tokens,
        scale=_TINY_LENGTHS if args.shrink else 1.0,
    )
    return synthetic_loader(
        model,
        shapes,
        batch_size=batch_size,
        accumulation=accumulation,
        group=cfg.get("group", "none"),
        pack=bool(cfg.get("pack")),
    )


def _accumulation(samples: int, batch_size: int) -> int:
    if samples < 1 or samples % batch_size:
        raise ValueError(
            f"--samples {samples} must be a multiple of the batch size, {batch_size} (--batch-size)"
        )
    return samples // batch_size


def _median_rate(amounts: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the median over steps of an amount a second."""
    return median(amount / took for amount, took in zip(amounts, seconds, strict=True))


def _totals(batches: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return what the micro-batches of a step hold; ``positions`` are tokens with padding."""
    works = [Work.of(batch) for batch in batches]
    return {
        "samples": float(sum(len(batch["sample_ids"]) for batch in batches)),
        "images": float(sum(len(work.image_texts) for work in works)),
        "input_tokens": float(sum(sum(work.lengths) for work in works)),
        "positions": float(sum(batch["input_ids"].numel() for batch in batches)),
        "supervised_tokens": float(sum(work.supervised for work in works)),
    }


def _ratios(methods: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return each method's figures over those of the plainer ones, both of them beside."""
    order = list(methods)
    pairs = [(a, b) for i, a in enumerate(order) for b in order[i + 1 :]]
    return {f"{a} / {b}": dict(_compared(methods[a], methods[b])) for a, b in pairs}


def _compared(
    one: Mapping[str, Any], other: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, float]]]:
    for title, key in (("step time", "seconds"), ("peak memory", "peak_gib")):
        if one[key] is not None:
            yield (
                title,
                {
                    "ratio": one[key] / other[key],
                    "numerator": one[key],
                    "denominator": other[key],
                },
            )
