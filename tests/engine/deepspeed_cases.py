"""Trains the case of parallel_case.py by DeepSpeed in two processes; run by test_deepspeed.py.

As a script: ``python deepspeed_cases.py engines FOLDER`` trains whole, and cut and resumed, under
both stages; ``variants FOLDER`` trains a few steps with parts offloaded, steps that one process
spoils and generations between them, and in bfloat16. Each does it in one process too.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from forks import ForkedGroup
from mmengine.hooks import Hook
from parallel_case import (
    OPTIM_WRAPPER,
    STEP_SIZE,
    WORLD_SIZE,
    Samples,
    collate,
    train_case,
)
from torch import distributed

from covft.checkpoints.trainable import unwrapped
from covft.engine import SampleLogHook

# DeepSpeed keeps small parameters whole, that is all of this model's, unless told otherwise.
PARTITIONED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
ENGINES = {"zero2": {"type": "zero2"}, "zero3": {"type": "zero3", "config": PARTITIONED}}
OFFLOADED = {
    "zero2": {"type": "zero2", "offload_optimizer": "cpu"},
    "zero3": {
        "type": "zero3",
        "offload_optimizer": "cpu",
        "offload_param": "cpu",
        "config": PARTITIONED,
    },
}
BF16 = {
    "ddp": {"type": "ddp"},
    "zero2": {"type": "zero2"},
    "zero3_float32": {"type": "zero3", "comm_dtype": "float32", "config": PARTITIONED},
    "zero3": {"type": "zero3", "config": PARTITIONED},
}
INFINITE_LOSS, INFINITE_GRADIENTS = 1, 2


class Spoil(Hook):
    """Makes one step's loss infinite and another's gradients too, on the last process."""

    def __init__(self) -> None:
        self.step = -1

    def before_train(self, runner):
        if runner.rank == runner.world_size - 1:
            unwrapped(runner.model).register_forward_hook(self._spoil)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.step = batch_idx

    def _spoil(self, module, arguments, output):
        if self.step == INFINITE_LOSS:
            return dataclasses.replace(output, loss_sum=output.loss_sum + torch.inf)
        if self.step == INFINITE_GRADIENTS:
            return dataclasses.replace(output, loss_sum=output.loss_sum * torch.inf)
        return None


def answers(model):
    """Return what a model sees and says, as texts."""
    batch = collate([Samples()[0]])
    images = {name: batch[name] for name in ("pixel_values", "image_to_sample")}
    context = {name: batch[name] for name in ("context_ids", "context_mask")}
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    (ids,) = model.generate(**text, **images, **context, max_new_tokens=3)
    seen = model.visual_tokens(**images, **context)
    return [f"seen {float(seen.norm()):.4f}, said {ids}"]


def train_a_little(folder: Path, *, steps: int, world_size: int = 1, **parts: Any) -> None:
    train_case(
        folder,
        world_size=world_size,
        train_cfg={"max_iters": steps, "accumulation": STEP_SIZE // world_size},
        checkpoint={"save_last": False, "interval": 100},
        **parts,
    )


def leave_as_a_kill_would(whole: Path, cut: Path) -> None:
    """Copy a finished run without what it wrote after its last but one checkpoint."""
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "iter_12")
    (cut / "weights.safetensors").unlink()


def engines(folder: Path) -> None:
    def task(rank: int) -> None:
        for name, strategy in ENGINES.items():
            parts = {"strategy": strategy, "rank": rank, "world_size": 2}
            train_case(folder / name / "whole", **parts)
            if rank == 0:
                leave_as_a_kill_would(folder / name / "whole", folder / name / "cut")
            distributed.barrier()
            train_case(folder / name / "cut", resume=True, **parts)

    ForkedGroup(WORLD_SIZE).run(task)
    train_case(folder / "one")


def variants(folder: Path) -> None:
    def looking() -> list[Hook]:
        return [Spoil(), SampleLogHook(preview=answers, interval=1)]

    precision = {"optim_wrapper": {**OPTIM_WRAPPER, "precision": "bf16"}}
    bf16 = {**precision, "steps": 2, "param_scheduler": None}

    def task(rank: int) -> None:
        processes = {"rank": rank, "world_size": 2}
        for name, strategy in OFFLOADED.items():
            parts = {"strategy": strategy, "hooks": looking(), **processes}
            train_a_little(folder / name, steps=4, **parts)
        for name, strategy in BF16.items():
            train_a_little(folder / "bf16" / name, strategy=strategy, **processes, **bf16)

    ForkedGroup(WORLD_SIZE).run(task)
    train_a_little(folder / "one", steps=4, hooks=looking())


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"engines": engines, "variants": variants}[sys.argv[1]](Path(sys.argv[2]))
