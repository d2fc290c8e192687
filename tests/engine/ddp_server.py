"""Trains toys in two processes with gloo; run by test_engine_ddp.py, which compares the files."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from mmengine.hooks import Hook
from torch import distributed
from toy_training import Loss, ToyDataset, ToyModel, toy_dataloader, toy_runner

from covft.engine import setup_distributed

WORLD_SIZE = 2
EVERY_3 = {"type": "CheckpointHook", "interval": 3, "max_keep": 3}


class SometimesBlind(ToyModel):
    """Leaves its vision part out of some micro-batches, like a model given text alone."""

    def forward(self, *, input_ids, labels, **batch):
        if int(input_ids.sum()) % 2:
            return super().forward(input_ids=input_ids, labels=labels, **batch)
        logits = self.llm(self.projector(self.embed(input_ids)))[:, :-1]
        targets = labels[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return Loss(loss, int((targets != -100).sum()))


class PartlySilent(ToyDataset):
    """One sample in eight has no supervised token."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if index % 8 == 0:
            sample["labels"][:] = -100
        return sample


class StopAt(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if batch_idx + 1 == 8:
            raise KeyboardInterrupt


def exact(folder: Path, *, rank: int, world_size: int) -> None:
    """Without dropout: to be equal to one process with twice the micro-batches."""
    accumulation = 8 // world_size
    parts = {"rank": rank, "world_size": world_size, "accumulation": accumulation}
    toy_runner(
        folder,
        model=SometimesBlind(dropout=0.0).double(),
        dataloader=toy_dataloader(batch_size=1, **parts),
        optim_wrapper={
            "optimizer": {"type": "SGD", "lr": 0.5},
            "clip_grad": {"max_norm": 0.3},
            "precision": "fp32",
        },
        train_cfg={"accumulation": accumulation},
        launcher="none" if world_size == 1 else "pytorch",
    ).train()


def with_dropout(folder: Path, *, rank: int, **parts) -> None:
    loader = toy_dataloader(rank=rank, world_size=WORLD_SIZE)
    toy_runner(folder, dataloader=loader, launcher="pytorch", **parts).train()


def silent_rank(folder: Path, *, rank: int) -> None:
    loader = toy_dataloader(
        PartlySilent(), batch_size=1, accumulation=1, rank=rank, world_size=WORLD_SIZE
    )
    train_cfg = {"accumulation": 1}
    toy_runner(folder, dataloader=loader, launcher="pytorch", train_cfg=train_cfg).train()


def work(folder: Path, rank: int) -> None:
    exact(folder / "two", rank=rank, world_size=WORLD_SIZE)
    with_dropout(folder / "whole", rank=rank, hooks=[EVERY_3])
    try:
        with_dropout(folder / "cut", rank=rank, hooks=[EVERY_3, StopAt()])
    except KeyboardInterrupt:
        distributed.barrier()
    with_dropout(folder / "cut", rank=rank, hooks=[EVERY_3], resume=True)
    silent_rank(folder / "silent", rank=rank)


def forked(rank: int, port: int, task: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD_SIZE, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        setup_distributed("pytorch")
        task()
        distributed.destroy_process_group()
        status = 0
    finally:
        # The traceback is printed by nobody else: this process is a copy of its parent.
        if status:
            sys.excepthook(*sys.exc_info())
        os._exit(status)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [forked(rank, port, lambda rank=rank: work(folder, rank)) for rank in range(2)]
    failed = [os.waitpid(child, 0)[1] for child in children]
    exact(folder / "one", rank=0, world_size=1)
    sys.exit(int(any(failed)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
