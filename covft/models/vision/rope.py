"""The 2-D rotary position embedding of DINOv3.

It follows transformers' ``DINOv3ViTRopePositionEmbedding`` in evaluation mode. The random shifts
and scales of DINOv3's pre-training are left out on purpose: they would act on a frozen encoder too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rope_tables(
    grid: int, head_dim: int, *, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of every patch's angles, each (grid * grid, head_dim) in float32.

    They are computed at each call (a few small kernels) instead of being kept: a kept table would
    be garbage after ``to_empty``, and useless in training once made in inference mode.

    Args:
        grid: Patches per side; patch centres span [-1, 1] on both axes whatever the grid.
        head_dim: Width of one attention head, a multiple of 4.
        theta: Base of the periods.
        device: Where the tables are made.
    """
    frequencies = 1 / theta ** torch.arange(0, 1, 4 / head_dim, dtype=torch.float32, device=device)
    centres = torch.arange(0.5, grid, dtype=torch.float32, device=device) / grid * 2.0 - 1.0
    rows, columns = torch.meshgrid(centres, centres, indexing="ij")
    places = torch.stack([rows, columns], dim=-1).flatten(0, 1)
    angles = (2 * math.pi * places[:, :, None] * frequencies).flatten(1, 2).tile(2)
    return angles.cos(), angles.sin()


def rotate_patches(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last N of x's tokens; those before (CLS, registers, prompts) have no place.

    Args:
        x: Queries or keys, (I, heads, T, head_dim) with T >= N.
        cos: (N, head_dim).
        sin: (N, head_dim).
    """
    prefix, patches = x.split((x.shape[-2] - cos.shape[0], cos.shape[0]), dim=-2)
    first, second = patches.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    patches = patches * cos.to(x.dtype) + turned * sin.to(x.dtype)
    return torch.cat((prefix, patches), dim=-2)
