"""Which samples each optimizer step sees."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import numpy as np
from torch.utils.data import Sampler

from covft.datasets.packing import balanced_bins

Group = Literal["none", "length", "modality_length"]


class StepBatchSampler(Sampler[list[int]]):
    """An endless stream of micro-batches whose steps can be entered anywhere.

    The samples of step ``s`` depend on the seed, on ``s`` and on the global batch size alone:
    neither on how the batch is split into micro-batches and ranks nor on workers. A resumed run
    sets ``start_step`` and goes on where it was, at the cost of one permutation. Epochs follow each
    other without dropping samples, so that a step may span two of them.

    Args:
        lengths: Every sample's length, about.
        has_image: Every sample's modality; only ``modality_length`` reads it.
        batch_size: Samples of a micro-batch; with ``costs``, on average.
        accumulation: Micro-batches of a step, per rank.
        rank: This process.
        world_size: All processes.
        seed: Of the permutations.
        shuffle: Whether samples are permuted, anew in every epoch.
        group: ``length``: a step's samples are random, its micro-batches hold similar lengths.
            ``modality_length``: also, a step holds only samples with images or only samples
            without, except for what is left over in an epoch (LLaVA-1.5's instruction tuning).
        costs: What every sample costs: a step's samples, which are the same, are then packed into
            micro-batches of about equal cost instead of equal size. Of a micro-batch's ranks, costs
            are closest; the dearest micro-batch comes first. None packs nothing.

    Attributes:
        start_step: The step at which the next iteration begins.

    Raises:
        ValueError: If an argument is out of range or the arguments don't fit each other.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        has_image: Sequence[bool] | np.ndarray | None = None,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        group: Group = "none",
        costs: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        for name, value in (
            ("batch_size", batch_size),
            ("accumulation", accumulation),
            ("world_size", world_size),
            ("the number of samples", len(lengths)),
        ):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
        if group not in get_args(Group):
            raise ValueError(f"group must be one of {', '.join(get_args(Group))}, got {group!r}")
        if group == "modality_length" and (has_image is None or len(has_image) != len(lengths)):
            found = "none" if has_image is None else len(has_image)
            raise ValueError(
                f"group='modality_length' needs has_image of every sample: {len(lengths)} lengths, "
                f"has_image of {found}"
            )
        if costs is not None and group == "length":
            raise ValueError(
                "group='length' has no effect on packed micro-batches, whose costs are balanced"
            )
        if costs is not None and len(costs) != len(lengths):
            raise ValueError(f"{len(lengths)} lengths, but costs of {len(costs)} samples")
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.group = group
        self.start_step = 0
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._has_image = np.asarray(
            has_image if group == "modality_length" else np.zeros(len(lengths)), dtype=bool
        )
        self._costs = None if costs is None else np.asarray(costs, dtype=np.float64)
        self._epoch: tuple[int, np.ndarray] | None = None

    @property
    def step_size(self) -> int:
        """Samples of a step: the global batch size."""
        return self.batch_size * self.accumulation * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every sample has been seen; the last may reach into the next epoch."""
        return math.ceil(len(self._lengths) / self.step_size)

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while True:
            yield from self.micro_batches(step)[self.rank :: self.world_size]
            step += 1

    def micro_batches(self, step: int) -> list[list[int]]:
        """Return a step's micro-batches: the first of every rank, then the second of each, ..."""
        indices = self.step(step)
        if self._costs is None:
            starts = range(0, self.step_size, self.batch_size)
            return [indices[start : start + self.batch_size] for start in starts]
        bins = balanced_bins(self._costs[indices], self.accumulation * self.world_size)
        return [[indices[position] for position in members] for members in bins]

    def step(self, step: int) -> list[int]:
        """Return the samples of a step, of all micro-batches and ranks, in their order."""
        position, end = step * self.step_size, (step + 1) * self.step_size
        parts = []
        while position < end:
            epoch, offset = divmod(position, len(self._lengths))
            part = self._order(epoch)[offset : offset + end - position]
            parts.append(part)
            position += len(part)
        indices = np.concatenate(parts)
        if self.group != "none":
            # Stable, longest first: a batch that doesn't fit into memory shows at once.
            keys = (-self._lengths[indices], self._has_image[indices])
            indices = indices[np.lexsort(keys)]
        return [int(i) for i in indices]

    def _order(self, epoch: int) -> np.ndarray:
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            count = len(self._lengths)
            order = rng.permutation(count) if self.shuffle else np.arange(count)
            if self.group == "modality_length":
                order = self._by_modality(order, rng, epoch)
            self._epoch = (epoch, order)
        return self._epoch[1]

    def _by_modality(self, order: np.ndarray, rng: np.random.Generator, epoch: int) -> np.ndarray:
        """Arrange an epoch so that its whole steps hold one modality each.

        The first samples complete the step that the epoch before has begun; whole steps follow, and
        what is left over begins the next epoch's first step.
        """
        size = self.step_size
        head = -epoch * len(order) % size
        steps, rest = [], []
        for modality in (True, False):
            members = order[self._has_image[order] == modality]
            whole = len(members) // size * size
            steps += list(members[:whole].reshape(-1, size))
            rest.append(members[whole:])
        left = np.concatenate(rest)
        if self.shuffle:
            steps = [steps[i] for i in rng.permutation(len(steps))]
        if len(left) < min(head, len(order)):
            left = np.concatenate([left, steps.pop()])
        first, left = left[:head], left[head:]
        return np.concatenate([first, *steps, left])
