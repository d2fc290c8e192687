"""Trains toys in two processes with gloo; run by test_engine_ddp.py, which compares the files."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from forks import ForkedGroup
from mmengine.hooks import Hook
from parallel_case import WORLD_SIZE
from torch import distributed
from toy_training import ToyDataset, ToyModel, toy_dataloader, toy_runner

from covft.engine.train import _finished

EVERY_3 = {"type": "CheckpointHook", "interval": 3, "max_keep": 3}


class PartlySilent(ToyDataset):
    """Half of the samples have no supervised token."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if index % 2 == 0:
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
        model=ToyModel(dropout=0.0).double(),
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


def apart(folder: Path, *, rank: int) -> None:
    """Resume with a folder for each process, as on nodes that share no disk."""
    whole = folder / "whole"
    for name, steps in (("main_has_less", ((6,), (6, 9))), ("main_has_more", ((6, 9), (6,)))):
        resume_apart(folder / name / str(rank), [whole / f"iter_{n}.pth" for n in steps[rank]])
    other = folder / "other/iter_6.pth"
    other.parent.mkdir(exist_ok=True)
    if rank == 1:
        state = torch.load(whole / "iter_6.pth")
        torch.save({**state, "meta": {**state["meta"], "time": "another"}}, other)
    resume_apart(folder / "another_run" / str(rank), [other if rank else whole / "iter_6.pth"])
    # The main process alone has the first stage's weights.
    stages = [folder / "stages" / str(rank) / name for name in ("one", "two")]
    stages[rank].mkdir(parents=True)
    (stages[rank] / "weights.safetensors").touch()
    (folder / f"stages/{rank}/finished").write_text(str(_finished(stages)))


def resume_apart(folder: Path, checkpoints: list[Path]) -> None:
    """Write down after how many steps this process goes on, or why it doesn't."""
    folder.mkdir(parents=True)
    for checkpoint in checkpoints:
        shutil.copy(checkpoint, folder)
    rank = distributed.get_rank()
    loader = toy_dataloader(rank=rank, world_size=WORLD_SIZE)
    try:
        runner = toy_runner(folder, dataloader=loader, launcher="pytorch", resume=True)
        outcome = str(runner.iter)
    except ValueError as error:
        outcome = str(error)
    (folder / "outcome").write_text(outcome)
    distributed.barrier()


def work(folder: Path, rank: int) -> None:
    exact(folder / "two", rank=rank, world_size=WORLD_SIZE)
    with_dropout(folder / "whole", rank=rank, hooks=[EVERY_3])
    try:
        with_dropout(folder / "cut", rank=rank, hooks=[EVERY_3, StopAt()])
    except KeyboardInterrupt:
        distributed.barrier()
    with_dropout(folder / "cut", rank=rank, hooks=[EVERY_3], resume=True)
    silent_rank(folder / "silent", rank=rank)
    apart(folder, rank=rank)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    ForkedGroup(WORLD_SIZE).run(lambda rank: work(folder, rank))
    exact(folder / "one", rank=0, world_size=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
