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
from collections.abc import Callable
from pathlib import Path

import torch
from parallel_case import free_port, joined
from torch.distributed import checkpoint as distributed_checkpoint
from toy_training import toy_dataloader, toy_runner

from covft.engine import checkpoint_hook

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


def train(work_dir: Path, rank: int, world_size: int = 2) -> None:
    hook = {"type": "CheckpointHook", "interval": 2, "max_keep": 2}
    toy_runner(
        work_dir,
        max_iters=MAX_ITERS,
        hooks=[hook, {"type": "ProgressHook", "interval": 50}],
        dataloader=toy_dataloader(rank=rank, world_size=world_size),
        strategy={"type": "fsdp2"},
        launcher="pytorch",
        resume=True,
    ).train()


class SaveMoments:
    """Calls ``visit`` with a name before and after what a save does."""

    def __init__(self, visit: Callable[[str], None]) -> None:
        self.visit = visit
        self.is_saving = False
        self._wrap(distributed_checkpoint, "save", "shards")
        self._wrap(Path, "replace", "rename")
        write = checkpoint_hook.write_sharded_checkpoint

        def traced_write(*args, **kwargs):
            self.is_saving = True
            path = write(*args, **kwargs)
            self.is_saving = False
            return path

        checkpoint_hook.write_sharded_checkpoint = traced_write

    def _wrap(self, owner, name: str, label: str) -> None:
        function = getattr(owner, name)

        def traced(*args, **kwargs):
            self.moment(f"before {label}")
            result = function(*args, **kwargs)
            self.moment(f"after {label}")
            return result

        setattr(owner, name, traced)

    def moment(self, name: str) -> None:
        if self.is_saving:
            self.visit(name)


def forked(work: Callable[[], None], rank: int, port: int) -> int:
    """Run ``work`` in a child process of a group of two; return its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            with joined(rank, 2, port):
                work()
        status = 0
    finally:
        os._exit(status)


def killed_while_saving(work_dir: Path, victim: int, moment: str, number: int) -> None:
    def visit(name: str) -> None:
        nonlocal number
        number -= name == moment
        if number == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def work(rank: int) -> None:
        if rank == victim:
            SaveMoments(visit)
        train(work_dir, rank)

    for _ in range(3):  # the port may be another test's by the time that it is used
        port = free_port()
        children = [forked(lambda rank=rank: work(rank), rank, port) for rank in range(2)]
        status = os.waitpid(children[victim], 0)[1]
        # Without it, the other one fails or waits, as its launcher would see.
        time.sleep(0.05)
        os.kill(children[1 - victim], signal.SIGKILL)
        os.waitpid(children[1 - victim], 0)
        if os.WIFSIGNALED(status):
            break
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status


def trained(work_dir: Path) -> None:
    port = free_port()
    children = [forked(lambda rank=rank: train(work_dir, rank), rank, port) for rank in range(2)]
    assert not any(os.waitpid(child, 0)[1] for child in children), "a training process failed"


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    left = []
    for kill in KILLS:
        killed_while_saving(folder / "cut", *kill)
        left.append(sorted(path.name for path in (folder / "cut").glob("iter_*")))
    trained(folder / "cut")
    trained(folder / "whole")
    print(json.dumps(left))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
