"""Checkpoints: what is in them, how they are found, written and pruned, and resuming from one.

A checkpoint holds what training changes (see :mod:`covft.checkpoints.trainable`), the optimizer,
the schedule, the counters and the random generators of every process, all readable with
``torch.load(weights_only=True)``. What the config decides (learning rates, the schedule's shape)
is not taken from it.
"""

from __future__ import annotations

import re
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.logging import HistoryBuffer, MessageHub

import covft
from covft.checkpoints.atomic import atomic_write, atomic_write_text
from covft.checkpoints.trainable import (
    check_same_parameters,
    copy_into,
    trainable_state_dict,
    unwrapped,
)
from covft.config import changed_lines
from covft.engine.random_state import capture_random_state

if TYPE_CHECKING:
    from covft.engine.runner import Runner

LAST_CHECKPOINT = "last_checkpoint"
_NAME = re.compile(r"iter_(\d+)\.pth")
_FORMAT = 1


def checkpoint_path(work_dir: Path, iteration: int) -> Path:
    """Return where the checkpoint after ``iteration`` steps is kept."""
    return work_dir / f"iter_{iteration}.pth"


def find_checkpoints(work_dir: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest (by steps) first."""
    found = [path for path in work_dir.glob("iter_*.pth") if _NAME.fullmatch(path.name)]
    return sorted(found, key=iteration_of, reverse=True)


def iteration_of(path: Path) -> int:
    """Return after how many steps a checkpoint of :func:`find_checkpoints` was written."""
    match = _NAME.fullmatch(path.name)
    assert match, f"{path} isn't named like a checkpoint"
    return int(match[1])


def collect_state(runner: Runner, iteration: int) -> dict[str, Any]:
    """Return the checkpoint after ``iteration`` steps; all processes take part."""
    weights = trainable_state_dict(runner.model)
    return {
        "format": _FORMAT,
        "meta": {
            "covft_version": covft.__version__,
            "iter": iteration,
            "max_iters": runner.max_iters,
            "world_size": get_world_size(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "config": runner.config_text,
            "parameters": {name: list(value.shape) for name, value in weights.items()},
        },
        "state_dict": weights,
        "optimizer": runner.optim_wrapper.optimizer.state_dict(),
        "param_schedulers": [scheduler.state_dict() for scheduler in runner.param_schedulers or ()],
        "message_hub": _plain_message_hub(runner.message_hub),
        "loop": runner.train_loop.state_dict(),
        "random_states": all_gather_object(capture_random_state()),
    }


def write_checkpoint(state: Mapping[str, Any], work_dir: Path, *, max_keep: int) -> Path:
    """Write a checkpoint; then, and only then, remove the oldest of more than ``max_keep``."""
    path = checkpoint_path(work_dir, state["meta"]["iter"])
    atomic_write(path, lambda partial: torch.save(dict(state), partial))
    atomic_write_text(work_dir / LAST_CHECKPOINT, path.name)
    for old in find_checkpoints(work_dir)[max_keep:]:
        old.unlink(missing_ok=True)
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        FileNotFoundError: If it doesn't exist.
        ValueError: If it is torn, or no checkpoint of this project.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at '{path}'")
    try:
        # torch.load doesn't look at the checksums that torch.save has written.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of its part '{damaged}' is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    # torch raises RuntimeError, EOFError, UnpicklingError, ... depending on where a file is torn.
    except Exception as error:
        raise ValueError(f"checkpoint {path} can't be read: {error}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"{path} is no checkpoint of this version of covft (format {_FORMAT})")
    return state


def newest_readable(paths: Sequence[Path], runner: Runner) -> tuple[Path, dict[str, Any]] | None:
    """Return the first of ``paths`` that can be read, with its content; warn about the others."""
    for path in paths:
        try:
            return path, read_checkpoint(path)
        except ValueError as error:
            runner.logger.warning(f"{error}; falling back to the checkpoint before it")
    return None


def restore_state(runner: Runner, state: Mapping[str, Any], *, source: Path) -> None:
    """Bring a prepared runner to where a checkpoint was written.

    Raises:
        ValueError: If the model's trainable parameters, or how the optimizer groups them, differ
            from the checkpoint's.
    """
    own = trainable_state_dict(runner.model)
    saved_shapes = {name: value.shape for name, value in state["state_dict"].items()}
    own_shapes = {name: value.shape for name, value in own.items()}
    check_same_parameters(saved_shapes, own_shapes, source=str(source))
    _restore_optimizer(runner, state["optimizer"], source)
    copy_into(unwrapped(runner.model).state_dict(), state["state_dict"])
    schedulers = runner.param_schedulers or ()
    if len(schedulers) != len(state["param_schedulers"]):
        raise ValueError(
            f"{source} has {len(state['param_schedulers'])} learning-rate schedules, the config "
            f"{len(schedulers)}; to keep a constant learning rate from here on, use "
            "param_scheduler=dict(type='CosineWarmup', warmup_iters=0, min_lr_ratio=1.0)"
        )
    for scheduler, saved in zip(schedulers, state["param_schedulers"], strict=True):
        scheduler.load_state_dict(saved)
    _restore_message_hub(runner.message_hub, state["message_hub"])
    meta = state["meta"]
    random_state = None
    if meta["world_size"] == get_world_size():
        random_state = state["random_states"][get_rank()]
    else:
        runner.logger.warning(
            f"{source} was written by {meta['world_size']} processes and is resumed by "
            f"{get_world_size()}: dropout draws other numbers than an uninterrupted run"
        )
    runner.train_loop.resume(meta["iter"], state["loop"], random_state)
    _report_config_changes(runner, meta["config"])


def _restore_optimizer(runner: Runner, saved: Mapping[str, Any], source: Path) -> None:
    optimizer = runner.optim_wrapper.optimizer
    own_groups = optimizer.state_dict()["param_groups"]
    own_layout = [(group["name"], group["param_names"]) for group in own_groups]
    saved_layout = [(group["name"], group["param_names"]) for group in saved["param_groups"]]
    if own_layout != saved_layout:
        raise ValueError(
            f"{source}: its optimizer has the groups {_summary(saved_layout)}, the config asks for "
            f"{_summary(own_layout)}; resume with the same optim_wrapper.lr prefixes and the same "
            "kind of weight decay, or start a new stage from the weights"
        )
    # Only the moments are taken: learning rates, betas and decay are the config's.
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own_groups})


def _summary(layout: Sequence[tuple[str, Sequence[str]]]) -> str:
    return ", ".join(f"{name} ({len(names)} parameters)" for name, names in layout)


def _plain_message_hub(hub: MessageHub) -> dict[str, Any]:
    """Return the hub's state without NumPy arrays, which ``weights_only`` wouldn't read."""
    state = hub.state_dict()
    return {
        "scalars": {
            name: [[float(v) for v in buffer.data[0]], [int(c) for c in buffer.data[1]]]
            for name, buffer in state["log_scalars"].items()
        },
        "info": {
            name: value
            for name, value in state["runtime_info"].items()
            if isinstance(value, (bool, int, float, str, type(None)))
        },
    }


def _restore_message_hub(hub: MessageHub, saved: Mapping[str, Any]) -> None:
    scalars = {name: HistoryBuffer(*histories) for name, histories in saved["scalars"].items()}
    resumed = dict.fromkeys([*scalars, *saved["info"]], True)
    hub.load_state_dict(
        {"log_scalars": scalars, "runtime_info": saved["info"], "resumed_keys": resumed}
    )


def _report_config_changes(runner: Runner, saved_text: str) -> None:
    changes = changed_lines(saved_text, runner.config_text)
    if changes:
        runner.logger.warning(
            "the config has changed since the checkpoint was written; the one of now counts:\n"
            + "\n".join(changes)
        )
