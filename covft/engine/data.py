"""The dataloader of a training run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mmengine.dist import get_dist_info
from torch.utils.data import DataLoader

from covft.datasets.instruct import InstructDataset
from covft.datasets.sampler import Group, StepBatchSampler


def build_dataloader(
    dataset: InstructDataset,
    collate_fn: Callable[[list[Any]], dict[str, Any]],
    *,
    batch_size: int,
    accumulation: int = 1,
    num_workers: int = 0,
    group: Group = "none",
    shuffle: bool = True,
    seed: int = 0,
) -> DataLoader[Any]:
    """Build an endless loader of micro-batches for this process's share of every optimizer step.

    In a distributed run call :func:`covft.engine.setup_distributed` first. What a dataset draws at
    random should depend on the sample alone: workers of a resumed run start from other seeds.

    Args:
        dataset: The training samples.
        collate_fn: Makes a micro-batch of a list of samples.
        batch_size: Samples per micro-batch and process.
        accumulation: Micro-batches per optimizer step and process, as in ``train_cfg``.
        num_workers: Processes that read samples; 0 reads them in this one.
        group: How the samples of a step are chosen: "none", "length" or "modality_length".
        shuffle: Whether the order is random.
        seed: Seed of the order.
    """
    rank, world_size = get_dist_info()
    sampler = StepBatchSampler(
        dataset.lengths(),
        has_image=[dataset.has_image(index) for index in range(len(dataset))],
        batch_size=batch_size,
        accumulation=accumulation,
        rank=rank,
        world_size=world_size,
        seed=seed,
        shuffle=shuffle,
        group=group,
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate_fn,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )
