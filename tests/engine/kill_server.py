"""Trains a toy in processes that are killed over and over; run by test_engine_kill.py.

torch is imported once: every training process is a fork of this one, and dies of a real SIGKILL.
Half of them kill themselves at a random one of the moments of a save, the others are killed from
outside after a random time.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401  (imported before the forks, which then needn't)
import torch
from forks import forked
from save_moments import SaveMoments
from toy_training import toy_runner

MAX_ITERS = 120
NUM_KILLS = 26


def train(work_dir: Path) -> None:
    hooks = [
        {"type": "CheckpointHook", "interval": 2, "max_keep": 2},
        {"type": "ProgressHook", "interval": 50},
    ]
    toy_runner(work_dir, max_iters=MAX_ITERS, hooks=hooks, resume=True, seed=3).train()


def was_killed(child: int) -> bool:
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        return True
    assert os.WEXITSTATUS(status) == 0, f"a training process failed with status {status}"
    return False


def killed_while_saving(work_dir: Path, countdown: int, report: Path) -> bool:
    def visit(name: str) -> None:
        nonlocal countdown
        countdown -= 1
        if countdown == 0:
            with report.open("a") as file:
                file.write(f"{name}\n")
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        steps = {"flush": (os, "fsync"), "rename": (Path, "replace"), "removal": (Path, "unlink")}
        moments = SaveMoments(visit, write="write_checkpoint", steps=steps)
        save = torch.save

        def torn_save(state, path):
            save(state, path)
            os.truncate(path, path.stat().st_size // 2)
            moments.moment("half a file")
            save(state, path)

        torch.save = torn_save
        train(work_dir)

    return was_killed(forked(work))


def killed_after(work_dir: Path, seconds: float) -> bool:
    child = forked(lambda: train(work_dir))
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return was_killed(child)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    whole, cut, report = folder / "whole", folder / "cut", folder / "moments.txt"
    started = time.perf_counter()
    assert not was_killed(forked(lambda: train(whole)))
    seconds = time.perf_counter() - started
    numbers = random.Random(0)
    kills = 0
    for attempt in range(NUM_KILLS):
        if attempt % 2:
            kills += killed_after(cut, numbers.uniform(0.02, 0.15) * seconds)
        else:
            kills += killed_while_saving(cut, numbers.randint(1, 40), report)
    assert not was_killed(forked(lambda: train(cut)))
    print(json.dumps({"kills": kills, "moments": report.read_text().splitlines()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
