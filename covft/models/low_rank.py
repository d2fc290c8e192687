"""What the LoRAs of encoder and LLM share (Hu et al., ICLR 2022, section 4.1).

A frozen weight W becomes ``W + scale B A``, with A (rank, in_features), B (out_features, rank) and
``scale = alpha / rank``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def check_low_rank(rank: int, alpha: float, dropout: float, *, where: str) -> None:
    """Check the options of an update.

    Args:
        rank: Rank of the update.
        alpha: The update is scaled by alpha / rank.
        dropout: Rate on the update's input in training.
        where: The config key they stand under, for the error.

    Raises:
        ValueError: If one is out of range.
    """
    if rank < 1:
        raise ValueError(f"{where}.rank must be at least 1, got {rank}")
    if alpha <= 0:
        raise ValueError(f"{where}.alpha must be above 0, got {alpha}: it scales the updates")
    if not 0 <= dropout < 1:
        raise ValueError(f"{where}.dropout must be in [0, 1), got {dropout}")


def zero_update(
    in_features: int, out_features: int, *, rank: int, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the factors A and B of an update that trains, and changes nothing yet: B is zero."""
    a = torch.empty(rank, in_features, dtype=dtype, device=device)
    b = torch.zeros(out_features, rank, dtype=dtype, device=device)
    # An nn.Linear's initial weights, as the authors' code has it; the paper says Gaussian.
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return nn.Parameter(a), nn.Parameter(b)


@torch.no_grad()
def merge_update(
    weight: Tensor, a: Tensor, b: Tensor, *, scale: float, dtype: torch.dtype
) -> Tensor:
    """Return ``weight + scale B A``, (out_features, in_features), in the type ``dtype``."""
    # In 16 bits the product would be rounded before it is added.
    exact = torch.promote_types(dtype, torch.float32)
    return (weight.to(exact) + scale * (b.to(exact) @ a.to(exact))).to(dtype)
