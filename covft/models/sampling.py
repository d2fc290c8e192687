"""Sampling answers instead of taking the likeliest token, with random numbers of one's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Attributes:
        temperature: The logits are divided by it.
        top_p: Only the likeliest tokens that together reach this probability are drawn from.
        seed: Makes the draws repeatable; None draws others each time.

    Raises:
        ValueError: If a number is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be positive, got {self.temperature}; leave sampling out for the "
                "likeliest token each time"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")

    def processors(self, device: torch.device | str) -> LogitsProcessorList:
        """Return what makes greedy generation draw samples; each call starts from the seed.

        Args:
            device: Where the logits will be.
        """
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        processors = LogitsProcessorList([TemperatureLogitsWarper(float(self.temperature))])
        if self.top_p < 1:
            processors.append(TopPLogitsWarper(self.top_p))
        processors.append(_GumbelNoise(generator))
        return processors


class _GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise: the largest sum is a draw from the softmax (Gumbel, 1954).

    transformers' own sampling draws from the process's generator, which training may be using.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # In float32 an exponential is zero, its noise infinite, once in 2^24 draws: a token in
        # every 500 or so of a vocabulary of 32,000.
        noise = torch.empty_like(scores, dtype=torch.float64).exponential_(generator=self.generator)
        return scores - noise.clamp_min(torch.finfo(torch.float64).tiny).log()
