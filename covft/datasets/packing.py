"""Which samples share a micro-batch: bins of about equal cost, over micro-batches and ranks.

Ranks wait for each other at the end of every micro-batch, so that a step takes as long as the
dearest bin of each micro-batch, added up. Samples are dealt out by longest processing time first
(Graham, SIAM J. Appl. Math. 1969), then swapped between bins as long as that evens out two of them.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

#: Bins are left as they are once none is above the mean by more than this share.
_CLOSE = 2e-3
#: Bins at either end of the loads that a bin is compared with.
_NUM_PARTNERS = 8


@dataclass(frozen=True)
class CostModel:
    """What a sample costs: linear in its tokens and images, quadratic in its tokens.

    In FLOPs of a training step without recomputation, with t tokens and s squares (images, or tiles
    of them)::

        per_token * t + per_pair * t**2 + per_square * s

    Only ratios matter to the packing. By default a token's cost alone counts; those of a model are
    :func:`covft.engine.flops.cost_model`.

    Attributes:
        per_token: Of the LLM's linear layers.
        per_pair: Of its attention; half of the square, since it's causal.
        per_square: Of the vision encoder and the projector.

    Raises:
        ValueError: If a number is negative, or tokens cost nothing.
    """

    per_token: float = 1.0
    per_pair: float = 0.0
    per_square: float = 0.0

    def __post_init__(self) -> None:
        if self.per_token <= 0 or min(self.per_pair, self.per_square) < 0:
            raise ValueError(f"per_token must be positive, the others not negative, got {self}")

    def costs(self, tokens: np.ndarray, squares: np.ndarray) -> np.ndarray:
        """Return what samples cost.

        Args:
            tokens: Of each sample in the LLM, images included, (N,).
            squares: Images of each, or their tiles, (N,).

        Returns:
            FLOPs, (N,) float64; at least those of one token.
        """
        count = np.maximum(np.asarray(tokens, dtype=np.float64), 1.0)
        squares = np.asarray(squares, dtype=np.float64)
        return self.per_token * count + self.per_pair * count**2 + self.per_square * squares


def balanced_bins(costs: np.ndarray, num_bins: int) -> list[list[int]]:
    """Distribute samples over bins of about equal cost.

    Deterministic: every rank makes the same bins of the same costs.

    Args:
        costs: Of each sample, (N,), positive.
        num_bins: At most N.

    Returns:
        Indices into ``costs`` by bin, ascending in each, the dearest bin first; none is empty.

    Raises:
        ValueError: If there are fewer samples than bins, or a cost isn't positive.
    """
    costs = np.asarray(costs, dtype=np.float64)
    if not 1 <= num_bins <= len(costs):
        raise ValueError(f"{len(costs)} samples can't fill {num_bins} bins")
    if not costs.min() > 0:
        raise ValueError(f"costs must be positive, got {costs.min()}")
    owner = _even_out(_dealt_out(costs, num_bins), costs, num_bins)
    loads = np.bincount(owner, weights=costs, minlength=num_bins)
    order = np.argsort(-loads, kind="stable")
    return [np.flatnonzero(owner == number).tolist() for number in order]


def _dealt_out(costs: np.ndarray, num_bins: int) -> np.ndarray:
    """Give each sample, the dearest first, to the bin with the least; return bins, (N,)."""
    owner = np.zeros(len(costs), dtype=np.int64)
    heap = [(0.0, number) for number in range(num_bins)]
    for sample in np.argsort(-costs, kind="stable").tolist():
        load, number = heap[0]
        owner[sample] = number
        heapq.heapreplace(heap, (load + float(costs[sample]), number))
    return owner


def _even_out(owner: np.ndarray, costs: np.ndarray, num_bins: int) -> np.ndarray:
    """Swap or move samples between two bins while that evens them out, starting at the dearest."""
    loads = np.bincount(owner, weights=costs, minlength=num_bins)
    sizes = np.bincount(owner, minlength=num_bins)
    enough = (1 + _CLOSE) * loads.mean()
    settled = np.zeros(num_bins, dtype=bool)
    # The bound is never met in practice; it keeps odd costs from taking long.
    for _ in range(4 * num_bins):
        if settled.all() or loads.max() <= enough:
            break
        heavy = int(np.argmax(np.where(settled, -np.inf, loads)))
        swap = _best_swap(heavy, owner, costs, loads, sizes)
        if swap is None:
            settled[heavy] = True
            continue
        mine, theirs, light = swap
        owner[mine] = light
        delta = costs[mine]
        if theirs is None:
            sizes[heavy] -= 1
            sizes[light] += 1
        else:
            owner[theirs] = heavy
            delta = delta - costs[theirs]
        loads[heavy] -= delta
        loads[light] += delta
    return owner


def _best_swap(
    heavy: int, owner: np.ndarray, costs: np.ndarray, loads: np.ndarray, sizes: np.ndarray
) -> tuple[int, int | None, int] | None:
    """Return the sample to give away, the one to take for it (or None), and the other bin.

    Moving ``d`` from a bin of load H to one of load L changes the sum of their squares by
    ``2 d (d - (H - L))``. Tried are the lightest bins, which have most room, and the
    heaviest, which found no partner themselves and may be relieved.
    """
    order = np.argsort(loads, kind="stable")
    tried = np.zeros(len(loads), dtype=bool)
    tried[order[:_NUM_PARTNERS]] = tried[order[-_NUM_PARTNERS:]] = True
    tried[heavy] = False
    if not tried.any():
        return None
    mine, theirs = np.flatnonzero(owner == heavy), np.flatnonzero(tried[owner])
    # What comes back for a sample: one of theirs, or, if others stay behind, nothing.
    alone = order[:1] if sizes[heavy] > 1 else order[:0]
    partners = np.concatenate([owner[theirs], alone])
    returned = np.concatenate([costs[theirs], np.zeros(len(alone))])
    delta = costs[mine][:, None] - returned
    gain = delta * (delta - (loads[heavy] - loads[partners]))
    row, column = np.unravel_index(np.argmin(gain), gain.shape)
    if gain[row, column] > -1e-9 * loads[heavy] ** 2:
        return None
    taken = int(theirs[column]) if column < len(theirs) else None
    return int(mine[row]), taken, int(partners[column])
