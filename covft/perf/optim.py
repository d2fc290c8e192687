"""Optimizers for bfloat16 weights: how much of their way the weights go, bytes, step time.

A matrix of a model's typical weights (normal, standard deviation 0.02) is trained by AdamW under
gradients of constant mean and ten times as much noise, the same for all. The yardstick is AdamW on
float32 weights: *displacement kept* is the sum of the updates that an optimizer has applied,
projected on the sum of the yardstick's, over the latter's length. What rounds updates away falls
short of 1.

What a weight is, is what its optimizer goes on from: with lower halves, both halves together. What
the forward pass sees, the upper half alone, is rounded once and no further off however many steps
were made; that is given as ``kept_in_forward``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from covft.engine.bf16_adamw import BF16AdamW
from covft.perf.arguments import add_conditions, settings_of
from covft.perf.timing import check_device, conditions, interleaved_medians, num_threads

_STD = 0.02
_NOISE = 10.0
_YARDSTICK = "fp32"


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        size: Parameters.
        steps: Updates.
        lr: Learning rate.
        rounds: How often each optimizer's step is timed, after those updates.
        compile: Also time :class:`BF16AdamW` with compiled kernels.
        threads: PyTorch's threads.
        device: "cpu" or "cuda".
    """

    size: int = 2**20
    steps: int = 200
    lr: float = 2e-5
    rounds: int = 9
    compile: bool = False
    threads: int = 1
    device: str = "cpu"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    default = Settings()
    parser.add_argument("--size", type=int, default=default.size, help="parameters")
    parser.add_argument("--steps", type=int, default=default.steps, help="updates")
    parser.add_argument("--lr", type=float, default=default.lr, help="learning rate")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="timings of each step")
    parser.add_argument("--compile", action="store_true", help="with compiled kernels, too")
    add_conditions(parser, threads=default.threads, device=default.device)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the command line asks for; see :func:`measure`."""
    return measure(settings_of(Settings, args))


def measure(settings: Settings) -> dict[str, Any]:
    """Measure every optimizer; those with moments in 8 bits only where bitsandbytes is installed.

    Returns:
        By optimizer: ``kept`` and its parts, the ``projection`` and the yardstick's ``length``;
        ``kept_in_forward``; ``bytes_per_parameter`` of weight, gradient and state; ``ms`` of a
        step, and ``ns_per_parameter``.

    Raises:
        ValueError: If a number isn't positive, or the device is missing.
    """
    if min(settings.size, settings.steps, settings.rounds, settings.threads) < 1:
        raise ValueError(f"sizes, steps, rounds and threads must be at least 1, got {settings}")
    check_device(settings.device)
    with num_threads(settings.threads):
        trained = _trained(settings)
        length = float(trained[_YARDSTICK].way().norm())
        optimizers = {
            name: _figures(one, trained[_YARDSTICK].way(), length) for name, one in trained.items()
        }
        seconds = interleaved_medians(
            {name: one.optimizer.step for name, one in trained.items()},
            rounds=settings.rounds,
            device=torch.device(settings.device),
        )
        for name, found in optimizers.items():
            found["ms"] = 1000 * seconds[name]
            found["ns_per_parameter"] = 1e9 * seconds[name] / settings.size
        return {
            "benchmark": "optim",
            "settings": asdict(settings),
            "conditions": conditions(torch.device(settings.device)),
            "optimizers": optimizers,
        }


def table(result: Mapping[str, Any]) -> str:
    """Return a result of :func:`measure` as text."""
    lines = [
        f"{key}: {value}" for key, value in (result["settings"] | result["conditions"]).items()
    ]
    lines += [
        "",
        f"{'optimizer':<30}{'kept':>8}{'projection / length':>24}{'in forward':>12}"
        f"{'bytes':>8}{'ns/param':>10}",
    ]
    for name, found in result["optimizers"].items():
        parts = f"{found['projection']:.6f} / {found['length']:.6f}"
        lines.append(
            f"{name:<30}{found['kept']:>8.4f}{parts:>24}{found['kept_in_forward']:>12.4f}"
            f"{found['bytes_per_parameter']:>8.2f}{found['ns_per_parameter']:>10.2f}"
        )
    return "\n".join(lines)


@dataclass
class _Training:
    """A weight on its way."""

    weight: nn.Parameter
    optimizer: Optimizer
    start: Tensor

    def way(self) -> Tensor:
        """Return what all updates together did to what the optimizer goes on from, float64."""
        now = self.weight.detach().double()
        low = self.optimizer.state[self.weight].get("low_half")
        if low is not None:
            bits = self.weight.detach().view(torch.int16).to(torch.int32) << 16
            now = (bits + low.view(torch.int16)).view(torch.float32).double()
        return now - self.start

    def bytes_per_parameter(self) -> float:
        state = [v for v in self.optimizer.state[self.weight].values() if isinstance(v, Tensor)]
        # bitsandbytes keeps its quantisation maps, which all parameters share, in each state.
        shared = {v.data_ptr() for k, v in self.optimizer.state[self.weight].items() if "qmap" in k}
        own = sum(tensor.nbytes for tensor in state if tensor.data_ptr() not in shared)
        return (2 * self.weight.nbytes + own) / self.weight.numel()


def _trained(settings: Settings) -> dict[str, _Training]:
    """Return all optimizers and their weights after the same gradients."""
    generator = torch.Generator(settings.device).manual_seed(0)
    shape = (settings.size,)
    draw = partial(torch.randn, shape, device=settings.device, generator=generator)
    start = (draw() * _STD).bfloat16()
    direction = draw()
    trained = {}
    for name, (build, dtype) in _optimizers(settings).items():
        weight = nn.Parameter(start.to(dtype, copy=True))
        trained[name] = _Training(weight, build([weight], lr=settings.lr), start.double())
    for _ in range(settings.steps):
        gradient = (direction + _NOISE * draw()).bfloat16()
        for one in trained.values():
            one.weight.grad = gradient.to(one.weight.dtype)
            one.optimizer.step()
    return trained


def _optimizers(settings: Settings) -> dict[str, tuple[Callable[..., Optimizer], torch.dtype]]:
    half, single = torch.bfloat16, torch.float32
    # Fused kernels only where float32 goes through them, too.
    plain = partial(AdamW, weight_decay=0.0, fused=True)
    found: dict[str, tuple[Callable[..., Optimizer], torch.dtype]] = {
        _YARDSTICK: (plain, single),
        "bf16": (plain, half),
    }
    compiled = (False, True) if settings.compile else (False,)
    for moments in ("float32", "8bit") if _has_bitsandbytes() else ("float32",):
        for master in ("low_half", "stochastic"):
            for compile in compiled:
                name = f"bf16, {master}, {moments}" + (", compiled" if compile else "")
                options: dict[str, Any] = {"master": master, "moments": moments, "compile": compile}
                found[name] = (partial(BF16AdamW, **options), half)
    return found


def _has_bitsandbytes() -> bool:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return False
    return True


def _figures(one: _Training, yardstick: Tensor, length: float) -> dict[str, Any]:
    def projection(way: Tensor) -> float:
        return float(way @ yardstick) / length

    in_forward = one.weight.detach().double() - one.start
    return {
        "kept": projection(one.way()) / length,
        "projection": projection(one.way()),
        "length": length,
        "kept_in_forward": projection(in_forward) / length,
        "bytes_per_parameter": one.bytes_per_parameter(),
    }
