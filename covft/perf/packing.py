"""How full packed micro-batches are, against padded ones, on simulated ranks.

Lengths are drawn at random with the statistics of LLaVA-1.5's instruction data: 576 tokens of an
image in 94 % of the samples, and text of 308 tokens on average, log-normally distributed and cut
off (see :mod:`covft.perf.synthetic`). Steps come from the sampler that training uses.

Ranks wait for each other after every micro-batch. Efficiency is the real tokens over the number of
ranks times the longest rank's positions (padding included), both summed over micro-batches; and the
same with costs, of which attention and the vision encoder are a part.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from covft.config import load_config, stage_configs
from covft.datasets.packing import CostModel
from covft.datasets.sampler import Group, StepBatchSampler
from covft.engine.flops import cost_model
from covft.models.abstract import abstract_model
from covft.perf.arguments import settings_of
from covft.perf.synthetic import MEAN_TEXT_TOKENS, TEXT_ONLY_SHARE, TEXT_SPREAD, draw_shapes
from covft.perf.timing import conditions

#: How a step's samples are grouped, and whether they are packed.
_MODES: dict[str, tuple[Group, bool]] = {
    "padded, random": ("none", False),
    "padded, by length": ("length", False),
    "padded, by modality and length": ("modality_length", False),
    "packed": ("none", True),
}


@dataclass(frozen=True)
class Settings:
    """What is simulated.

    Attributes:
        config: Whose model says what a sample costs, and how many tokens an image has.
        samples: Size of the data set.
        steps: Steps that are looked at, from the first on.
        ranks: Processes.
        batch: Samples of a micro-batch; packed, on average.
        accumulation: Micro-batches of a step, per rank.
        max_length: Longest sample in tokens.
        seed: Of the lengths and of their order.
    """

    config: str = "llava15_7b_covft"
    samples: int = 60_000
    steps: int = 200
    ranks: int = 8
    batch: int = 4
    accumulation: int = 4
    max_length: int = 2048
    seed: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    default = Settings()
    parser.add_argument("--config", default=default.config, help="a config file or its name")
    parser.add_argument("--samples", type=int, default=default.samples)
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--ranks", type=int, default=default.ranks)
    parser.add_argument("--batch", type=int, default=default.batch, help="samples a micro-batch")
    parser.add_argument("--accumulation", type=int, default=default.accumulation)
    parser.add_argument("--max-length", type=int, default=default.max_length)
    parser.add_argument("--seed", type=int, default=default.seed)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Simulate what the command line asks for; see :func:`measure`."""
    return measure(settings_of(Settings, args))


def measure(settings: Settings) -> dict[str, Any]:
    """Look at the steps of every mode.

    Returns:
        ``lengths``: the mix that was drawn. ``modes`` by name: ``tokens``, the real ones, over
        ``positions``, ranks times the longest rank's, is ``token_efficiency``; ``cost`` over
        ``bound`` is ``cost_efficiency``; ``largest`` is the most positions of a micro-batch of one
        rank over the mean; ``plan_ms`` the median time to plan a step. ``speedup`` is the packed
        mode's over each: how much less ranks times cost the same samples take, as far as time is
        cost.

    Raises:
        ValueError: If a number isn't positive, or there are fewer samples than a step takes.
    """
    numbers = (settings.steps, settings.ranks, settings.batch, settings.accumulation)
    if min(numbers) < 1:
        raise ValueError(f"steps, ranks, batch and accumulation must be positive, got {settings}")
    step_size = settings.ranks * settings.batch * settings.accumulation
    if settings.samples < step_size:
        raise ValueError(f"--samples {settings.samples} are fewer than the {step_size} of a step")
    model = abstract_model(stage_configs(load_config(settings.config))[-1][1].model)
    cost, image_tokens = cost_model(model), model.num_image_tokens
    tokens, squares = _sizes(settings, image_tokens)
    modes = {
        name: _measure_mode(settings, cost, tokens, squares, group=group, pack=pack)
        for name, (group, pack) in _MODES.items()
    }
    per_sample = {name: found["bound"] / found["cost"] for name, found in modes.items()}
    return {
        "benchmark": "packing",
        "settings": asdict(settings),
        "conditions": conditions(torch.device("cpu")),
        "lengths": {
            "distribution": f"log-normal, mean {MEAN_TEXT_TOKENS}, sigma {TEXT_SPREAD}, cut off",
            "tokens": float(tokens.mean()),
            "text": float((tokens - squares * image_tokens).mean()),
            "longest": int(tokens.max()),
            "text_only_share": float((squares == 0).mean()),
            "wanted_text_only_share": TEXT_ONLY_SHARE,
        },
        "cost_model": asdict(cost),
        "modes": modes,
        "speedup": {name: value / per_sample["packed"] for name, value in per_sample.items()},
    }


def table(result: dict[str, Any]) -> str:
    """Return a result of :func:`measure` as text."""
    lines = [
        f"{key}: {value}" for key, value in (result["settings"] | result["conditions"]).items()
    ]
    lengths = result["lengths"]
    lines += [
        f"tokens a sample: {lengths['tokens']:.0f}, of which text {lengths['text']:.0f} "
        f"({lengths['distribution']}); longest {lengths['longest']}; "
        f"{lengths['text_only_share']:.1%} without an image",
        "",
        f"{'micro-batches':<32}{'tokens':>10}{'cost':>10}{'largest':>10}{'packed is':>12}"
        f"{'plan, ms':>10}",
    ]
    for name, found in result["modes"].items():
        lines.append(
            f"{name:<32}{found['token_efficiency']:>10.3f}{found['cost_efficiency']:>10.3f}"
            f"{found['largest']:>9.2f}x{result['speedup'][name]:>11.2f}x{found['plan_ms']:>10.2f}"
        )
    return "\n".join(lines)


def _sizes(settings: Settings, image_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    max_text = settings.max_length - image_tokens
    if max_text < 1:
        raise ValueError(f"--max-length must exceed an image's {image_tokens} tokens")
    shapes = draw_shapes(settings.samples, seed=settings.seed, max_text=max_text)
    squares = np.array([shape.images for shape in shapes])
    return np.array([shape.text for shape in shapes]) + squares * image_tokens, squares


def _measure_mode(
    settings: Settings,
    cost: CostModel,
    tokens: np.ndarray,
    squares: np.ndarray,
    *,
    group: Group,
    pack: bool,
) -> dict[str, float]:
    costs = cost.costs(tokens, squares)
    sampler = StepBatchSampler(
        tokens,
        has_image=squares > 0,
        batch_size=settings.batch,
        accumulation=settings.accumulation,
        world_size=settings.ranks,
        seed=settings.seed,
        group=group,
        costs=costs if pack else None,
    )
    shape = (settings.accumulation, settings.ranks)
    sums = {"tokens": 0.0, "positions": 0.0, "cost": 0.0, "bound": 0.0}
    seconds, largest, count = [], 0.0, 0
    sampler.micro_batches(0)  # draws the permutation
    for step in range(settings.steps):
        started = time.perf_counter()
        batches = sampler.micro_batches(step)
        seconds.append(time.perf_counter() - started)
        # What a micro-batch takes, padding included.
        rows = [tokens[b] if pack else np.full(len(b), tokens[b].max()) for b in batches]
        positions = np.array([row.sum() for row in rows]).reshape(shape)
        taken = np.array(
            [cost.costs(row, squares[b]).sum() for row, b in zip(rows, batches, strict=True)]
        ).reshape(shape)
        members = np.concatenate(batches)
        sums["tokens"] += tokens[members].sum()
        sums["cost"] += costs[members].sum()
        sums["positions"] += settings.ranks * positions.max(1).sum()
        sums["bound"] += settings.ranks * taken.max(1).sum()
        largest, count = max(largest, positions.max()), count + len(batches)
    return {
        **{name: float(value) for name, value in sums.items()},
        "token_efficiency": float(sums["tokens"] / sums["positions"]),
        "cost_efficiency": float(sums["cost"] / sums["bound"]),
        "largest": float(largest / (sums["tokens"] / count)),
        "plan_ms": 1000 * median(seconds),
    }
