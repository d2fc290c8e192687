"""Checkpoints: what is in them, and resuming from one.

A checkpoint holds what training changes (see :mod:`covft.checkpoints.trainable`), the optimizer,
the schedule, the counters and the random generators of every process, all readable with
``torch.load(weights_only=True)``. What the config decides (learning rates, the schedule's shape)
is not taken from it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.logging import HistoryBuffer, MessageHub

import covft
from covft.checkpoints.sharded import SHARDS_NAME, is_sharded
from covft.checkpoints.trainable import check_same_parameters
from covft.config import changed_lines
from covft.engine.checkpoint_files import FORMAT
from covft.engine.random_state import capture_random_state

if TYPE_CHECKING:
    from covft.engine.runner import Runner

#: Options of optimizers, where they have them, that decide what their state holds.
_STATE_OPTIONS = ("master", "moments", "amsgrad")


def collect_state(runner: Runner, iteration: int, *, sharded: bool) -> dict[str, Any]:
    """Return the checkpoint after ``iteration`` steps; all processes take part.

    Args:
        runner: The runner.
        iteration: Finished steps.
        sharded: Whether the engine writes weights and optimizer itself, in shards. Otherwise the
            main process gets them whole.
    """
    state = {
        "format": FORMAT,
        "meta": {
            "covft_version": covft.__version__,
            "iter": iteration,
            "max_iters": runner.max_iters,
            "world_size": get_world_size(),
            "strategy": runner.strategy.name,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "config": runner.config_text,
            **_layout(runner),
        },
        "param_schedulers": [scheduler.state_dict() for scheduler in runner.param_schedulers or ()],
        "message_hub": _plain_message_hub(runner.message_hub),
        "loop": runner.train_loop.state_dict(),
        "random_states": all_gather_object(capture_random_state()),
    }
    if not sharded:
        state["state_dict"] = runner.strategy.full_state()
        state["optimizer"] = runner.strategy.full_optimizer_state()
    return state


def restore_state(runner: Runner, state: Mapping[str, Any], *, source: Path) -> None:
    """Bring a prepared runner to where a checkpoint was written; all processes take part.

    Raises:
        ValueError: If the model's trainable parameters, or how the optimizer groups them, differ
            from the checkpoint's, or its kind, or the size of a step; or the checkpoint holds
            another engine's shards.
    """
    meta = state["meta"]
    if is_sharded(source):
        _check_strategy(meta, runner.strategy.name, source)
    own = _layout(runner)
    _check_layout(meta, own, source)
    if meta["num_samples"] != own["num_samples"]:
        runner.logger.warning(
            f"{source} was written in a training on {meta['num_samples']} samples, now there are "
            f"{own['num_samples']}: they come in another order than in an uninterrupted run"
        )
    if is_sharded(source):
        runner.strategy.load_shards(source / SHARDS_NAME)
    else:
        runner.strategy.load_full_state(state["state_dict"], state["optimizer"])
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


def _check_layout(saved: Mapping[str, Any], own: Mapping[str, Any], source: Path) -> None:
    """Refuse a checkpoint whose parameters, optimizer or size of a step are others."""
    check_same_parameters(saved["parameters"], own["parameters"], source=str(source))
    if saved["groups"] != own["groups"]:
        raise ValueError(
            f"{source}: its optimizer has the groups {_summary(saved['groups'])}, the config asks "
            f"for {_summary(own['groups'])}; resume with the same optim_wrapper.lr prefixes and "
            "the same kind of weight decay, or start a new stage from the weights"
        )
    if saved["optimizer_kind"] != own["optimizer_kind"]:
        # The states of some have the same names, and would be taken for each other's numbers.
        raise ValueError(
            f"{source}: its optimizer is {_call(saved['optimizer_kind'])}, the config asks for "
            f"{_call(own['optimizer_kind'])}, whose state is another; resume with the same "
            "optim_wrapper.optimizer, or start a new stage from the weights (load_from)"
        )
    if saved["step_size"] != own["step_size"]:
        raise ValueError(
            f"{source} was written in a training with {saved['step_size']} samples per step, now "
            f"there are {own['step_size']}: samples would be repeated or left out. Choose "
            "train_dataloader.batch_size, train_cfg.accumulation and the number of processes such "
            f"that their product is {saved['step_size']}"
        )


def _layout(runner: Runner) -> dict[str, Any]:
    """Return what a checkpoint and a run must have in common, whatever the engine."""
    groups = runner.optim_wrapper.optimizer.param_groups
    loader: Any = runner.train_dataloader
    return {
        "parameters": {name: list(shape) for name, shape in runner.trained_shapes.items()},
        "groups": [[group["name"], list(group["param_names"])] for group in groups],
        "optimizer_kind": _optimizer_kind(runner.optim_wrapper.optimizer),
        "step_size": loader.batch_sampler.step_size,
        "num_samples": len(loader.dataset),
    }


def _optimizer_kind(optimizer: Any) -> dict[str, Any]:
    """Return an optimizer's class and those of its options that decide what its state holds."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer  # DeepSpeed's is one around torch's
    options = {
        name: getattr(optimizer, name, optimizer.defaults.get(name)) for name in _STATE_OPTIONS
    }
    present = {name: value for name, value in options.items() if value is not None}
    return {"type": type(optimizer).__name__, **present}


def _call(kind: Mapping[str, Any]) -> str:
    options = ", ".join(f"{name}={value!r}" for name, value in kind.items() if name != "type")
    return f"{kind['type']}({options})"


def _check_strategy(meta: Mapping[str, Any], own: str, source: Path) -> None:
    if meta["strategy"] != own:
        raise ValueError(
            f"{source} holds shards of strategy '{meta['strategy']}', this run uses '{own}': "
            f"resume with --strategy {meta['strategy']}. Whole checkpoints, which every strategy "
            "of replicas or FSDP2 can resume, are written with checkpoint.sharded=False; the final "
            "weights.safetensors can be loaded under all (load_from)"
        )


def _summary(layout: Sequence[Sequence[Any]]) -> str:
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
