"""Projectors: visual features to the LLM's embedding space, (I, N, D) to (I, M, H).

Module indices follow the public checkpoints: LLaVA's ``mm_projector.{0,2}`` and InternVL's
``mlp1.{0,1,3}``, so that loading is a renaming of the prefix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from covft.registry import PROJECTORS


class Projector(nn.Module):
    """A projector built for an encoder's and an LLM's width.

    Args:
        in_dim: Width D of the visual features.
        out_dim: Width H of the LLM's embeddings.
        num_tokens: Number N of visual features of one image.
    """

    def __init__(self, *, in_dim: int, out_dim: int, num_tokens: int) -> None:
        super().__init__()
        self.in_dim, self.out_dim = in_dim, out_dim
        #: Number M of tokens that the LLM gets for one image.
        self.num_tokens = num_tokens


@PROJECTORS.register_module()
class LinearProjector(Projector):
    """One linear map, as in the first LLaVA."""

    def __init__(self, *, in_dim: int, out_dim: int, num_tokens: int) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim, num_tokens=num_tokens)
        self.linear = nn.Linear(in_dim, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Project (I, N, D) to (I, N, H)."""
        return self.linear(features)


@PROJECTORS.register_module()
class MLPProjector(Projector):
    """Linear, then GELU and Linear ``depth - 1`` times: LLaVA-1.5's ``mlp2x_gelu``."""

    def __init__(self, *, in_dim: int, out_dim: int, num_tokens: int, depth: int = 2) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim, num_tokens=num_tokens)
        layers: list[nn.Module] = [nn.Linear(in_dim, out_dim)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(out_dim, out_dim)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Project (I, N, D) to (I, N, H)."""
        return self.layers(features)


@PROJECTORS.register_module()
class PixelShuffleProjector(Projector):
    """Pixel shuffle, then LayerNorm, Linear, GELU, Linear: InternVL2's ``mlp1``.

    Args:
        in_dim: See :class:`Projector`.
        out_dim: See :class:`Projector`.
        num_tokens: See :class:`Projector`; a square number.
        factor: Side of the square of features that becomes one token.
        init_scale: Factor on the last layer's initial weights. An optimizer step changes larger
            visual tokens less in proportion, so that short trainings bear a higher learning rate.

    Raises:
        ValueError: If the grid of features can't be divided by ``factor``.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int,
        num_tokens: int,
        factor: int = 2,
        init_scale: float = 1.0,
    ) -> None:
        grid = math.isqrt(num_tokens)
        if grid * grid != num_tokens or grid % factor:
            raise ValueError(
                f"PixelShuffleProjector needs a square grid of features divisible by {factor}, "
                f"got {num_tokens} features ({grid} x {num_tokens / grid:g}); "
                "change projector.factor or vision.backbone.image_size"
            )
        super().__init__(in_dim=in_dim, out_dim=out_dim, num_tokens=num_tokens // factor**2)
        self.factor, self.grid = factor, grid
        wide = in_dim * factor**2
        first, last = nn.Linear(wide, out_dim), nn.Linear(out_dim, out_dim)
        self.layers = nn.Sequential(nn.LayerNorm(wide), first, nn.GELU(), last)
        with torch.no_grad():
            last.weight.mul_(init_scale)

    def forward(self, features: Tensor) -> Tensor:
        """Project (I, N, D) to (I, N / factor², H)."""
        return self.layers(pixel_shuffle(features, self.grid, self.factor))


def pixel_shuffle(features: Tensor, grid: int, factor: int) -> Tensor:
    """Move squares of ``factor`` x ``factor`` features into the channels (InternVL2's "v2" order).

    Args:
        features: (I, grid², D), row by row.
        grid: Features along a side.
        factor: Side of a square.

    Returns:
        (I, (grid / factor)², factor² D); channels ordered by row, then column in the square.
    """
    images, _, width = features.shape
    side = grid // factor
    squares = features.reshape(images, side, factor, side, factor, width)
    return squares.permute(0, 1, 3, 2, 4, 5).reshape(images, side * side, factor**2 * width)
