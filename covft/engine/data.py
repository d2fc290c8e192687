"""The dataloader of a training run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from mmengine.dist import broadcast, get_dist_info
from torch.utils.data import DataLoader

from covft.datasets.base import ConversationDataset, Sizes
from covft.datasets.packing import CostModel
from covft.datasets.sampler import Group, StepBatchSampler


def build_dataloader(
    dataset: ConversationDataset,
    collate_fn: Callable[[list[Any]], dict[str, Any]],
    *,
    batch_size: int,
    accumulation: int = 1,
    num_workers: int = 0,
    group: Group = "none",
    shuffle: bool = True,
    seed: int = 0,
    pack: bool = False,
    lengths: Literal["estimated", "exact"] = "estimated",
    cost: CostModel | None = None,
) -> DataLoader[Any]:
    """Build an endless loader of micro-batches for this process's share of every optimizer step.

    In a distributed run call :func:`covft.engine.setup_distributed` first. What a dataset draws at
    random should depend on the sample alone: workers of a resumed run start from other seeds.

    Args:
        dataset: The training samples.
        collate_fn: Makes a micro-batch of a list of samples.
        batch_size: Samples per micro-batch and process; with ``pack``, on average.
        accumulation: Micro-batches per optimizer step and process, as in ``train_cfg``.
        num_workers: Processes that read samples; 0 reads them in this one.
        group: How the samples of a step are chosen: "none", "length" or "modality_length".
        shuffle: Whether the order is random.
        seed: Seed of the order.
        pack: Distribute each step's samples over micro-batches and processes so that all cost
            about the same, instead of equally many to each. ``collate_fn`` should pack, too.
        lengths: Of samples, where they matter (``pack``, or a ``group``): "estimated" from their
            bytes, or "exact", for which all samples are tokenised once, by ``num_workers``
            processes.
        cost: With ``pack``, what a sample costs; by default, its tokens alone count.

    Raises:
        ValueError: If settings don't go together or would have no effect.
    """
    check_dataloader(pack=pack, lengths=lengths, group=group)
    if cost is not None and not pack:
        raise ValueError("cost has no effect without pack=True")
    rank, world_size = get_dist_info()
    sizes: Sizes | None = None
    if lengths == "exact":
        sizes = _agreed(
            dataset.exact_sizes(num_workers=num_workers, rank=rank, world_size=world_size)
        )
    elif pack:
        sizes = dataset.sizes()
    by_modality = group == "modality_length"
    sampler = StepBatchSampler(
        dataset.lengths() if sizes is None else sizes.tokens,
        has_image=dataset.has_images() if by_modality else None,
        batch_size=batch_size,
        accumulation=accumulation,
        rank=rank,
        world_size=world_size,
        seed=seed,
        shuffle=shuffle,
        group=group,
        costs=(cost or CostModel()).costs(*sizes) if pack and sizes is not None else None,
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate_fn,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def _agreed(sizes: Sizes) -> Sizes:
    """Return the first process's sizes.

    An image file that one process could open and another couldn't would let them plan different
    steps.
    """
    both = torch.from_numpy(np.stack(sizes).astype(np.int64))
    broadcast(both, src=0)
    return Sizes(*both.numpy())


def check_dataloader(
    *, pack: bool = False, lengths: str = "estimated", group: str = "none", **others: Any
) -> None:
    """Check whether settings of :func:`build_dataloader` go together.

    Raises:
        ValueError: If one is unknown or would have no effect.
    """
    if lengths not in ("estimated", "exact"):
        raise ValueError(f"train_dataloader.lengths must be estimated or exact, got {lengths!r}")
    if lengths == "exact" and not pack and group == "none":
        raise ValueError(
            "train_dataloader.lengths='exact' has no effect without pack=True or a group; remove it"
        )
    if pack and group == "length":
        raise ValueError(
            "train_dataloader.group='length' has no effect with pack=True, which balances lengths "
            "itself; remove one of them"
        )
