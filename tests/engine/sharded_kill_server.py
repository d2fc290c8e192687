"""Kills processes that write sharded checkpoints together; run by test_parallel_kill.py.

torch is imported once: every training process is a fork of this one, and dies of a real SIGKILL at
one of the moments of a save at which the files are different, in turn on either process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from forks import ForkedGroup
from save_moments import SaveMoments
from torch.distributed import checkpoint as distributed_checkpoint
from toy_training import toy_dataloader, toy_runner

WORLD_SIZE = 2
MAX_ITERS = 10
#: Which process dies, at which moment of a save, and at which of several such moments.
KILLS = (
    (0, "before shards", 1),
    (0, "before rename", 1),  # all is written, and has but its temporary name
    (0, "after rename", 1),  # last_checkpoint isn't written
    (1, "after shards", 1),
    (0, "after rename", 2),  # nothing is pruned yet, of the first two
    (0, "before rename", 3),  # nothing is pruned of three
    (0, "after rename", 3),  # what is pruned has lost its name, and is still there
)


def train(work_dir: Path, rank: int) -> None:
    hook = {"type": "CheckpointHook", "interval": 2, "max_keep": 2}
    toy_runner(
        work_dir,
        max_iters=MAX_ITERS,
        hooks=[hook, {"type": "ProgressHook", "interval": 50}],
        dataloader=toy_dataloader(rank=rank, world_size=WORLD_SIZE),
        strategy={"type": "fsdp2"},
        launcher="pytorch",
        resume=True,
    ).train()


def killed_while_saving(work_dir: Path, victim: int, moment: str, number: int) -> None:
    def visit(name: str) -> None:
        nonlocal number
        number -= name == moment
        if number == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        SaveMoments(
            visit,
            write="write_sharded_checkpoint",
            steps={"shards": (distributed_checkpoint, "save"), "rename": (Path, "replace")},
        )
        train(work_dir, victim)

    group = ForkedGroup(WORLD_SIZE)
    other = group.fork(1 - victim, lambda: train(work_dir, 1 - victim))
    status = os.waitpid(group.fork(victim, work), 0)[1]
    # Without it, the other one fails or waits, as its launcher would see.
    time.sleep(0.05)
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    left = []
    for kill in KILLS:
        killed_while_saving(folder / "cut", *kill)
        left.append(sorted(path.name for path in (folder / "cut").glob("iter_*")))
    for name in ("cut", "whole"):
        ForkedGroup(WORLD_SIZE).run(lambda rank, name=name: train(folder / name, rank))
    print(json.dumps(left))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
