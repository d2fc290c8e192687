"""Deterministic parts of a set: the same for every epoch, rank and resumed run."""

from __future__ import annotations

import numpy as np


def checked_fraction(fraction: float, seed: int | None) -> None:
    """Check the two settings of a subset.

    Raises:
        ValueError: If the fraction isn't above 0 and up to 1, or the seed would have no effect.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction!r}")
    if fraction == 1 and seed is not None:
        raise ValueError(
            f"fraction_seed={seed} has no effect on the whole set; remove it or set fraction"
        )


def subset(count: int, fraction: float, *, seed: int) -> np.ndarray:
    """Return which of ``count`` items belong to a random part of them, ascending.

    Parts of the same seed are nested: an eighth is within the quarter.

    Args:
        count: All items.
        fraction: Their share, rounded to whole items, at least one.
        seed: Of the choice.
    """
    size = min(max(round(fraction * count), 1), count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:size])
