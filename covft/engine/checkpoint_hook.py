"""The hook that writes checkpoints, and the trained weights at the end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmengine.dist import barrier, is_main_process
from mmengine.hooks import Hook

import covft
from covft.checkpoints.trainable import WEIGHTS_NAME, save_tensors
from covft.engine.checkpoint import collect_state
from covft.engine.checkpoint_files import (
    checkpoint_path,
    write_checkpoint,
    write_sharded_checkpoint,
)
from covft.registry import HOOKS

if TYPE_CHECKING:
    from covft.engine.runner import Runner
    from covft.engine.strategies import Strategy


@HOOKS.register_module()
class CheckpointHook(Hook):
    """Writes a checkpoint every ``interval`` steps and ``weights.safetensors`` at the end.

    Args:
        interval: Optimizer steps between checkpoints.
        max_keep: How many of the newest are kept. With 1, a damaged file leaves nothing to resume
            from.
        save_last: Whether the end of the run gets a checkpoint too, from which a longer run could
            continue. The weights are written anyway.
        sharded: Whether every process writes its own part, into a folder ``iter_N``, which is fast
            and takes no memory; or one of them all into ``iter_N.pth``, from which any number of
            processes and other strategies can resume. By default as the strategy keeps the model.

    Raises:
        ValueError: If ``interval`` or ``max_keep`` is below 1.
    """

    # After every other hook, so that the state it saves is that at the end of the step.
    priority = "VERY_LOW"

    def __init__(
        self,
        *,
        interval: int = 500,
        max_keep: int = 2,
        save_last: bool = True,
        sharded: bool | None = None,
    ) -> None:
        if interval < 1 or max_keep < 1:
            raise ValueError(
                f"CheckpointHook: interval and max_keep must be at least 1, got {interval} and "
                f"{max_keep}"
            )
        self.interval = interval
        self.max_keep = max_keep
        self.save_last = save_last
        self.sharded = sharded

    def before_run(self, runner: Runner) -> None:
        """Refuse a way of writing that the strategy can't do, before anything is trained."""
        check_sharded(self.sharded, runner.strategy)

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint if it is time for one."""
        if (runner.iter + 1) % self.interval == 0:
            self._save(runner, runner.iter + 1)

    def after_train(self, runner: Runner) -> None:
        """Write the last checkpoint, and the weights if the run is finished."""
        work_dir = Path(runner.work_dir)
        last = checkpoint_path(work_dir, runner.iter, sharded=self._writes_shards(runner))
        if self.save_last and not last.exists():
            self._save(runner, runner.iter)
        weights = runner.strategy.full_state()
        if is_main_process():
            metadata = {"covft_version": covft.__version__, "iter": str(runner.iter)}
            metadata["config"] = runner.config_text
            save_tensors(weights, work_dir / WEIGHTS_NAME, metadata=metadata)
            runner.logger.info(f"trained weights: {work_dir / WEIGHTS_NAME}")
        barrier()

    def _save(self, runner: Runner, iteration: int) -> None:
        started = time.perf_counter()
        work_dir = Path(runner.work_dir)
        sharded = self._writes_shards(runner)
        state = collect_state(runner, iteration, sharded=sharded)
        runner.call_hook("before_save_checkpoint", checkpoint=state)
        path = checkpoint_path(work_dir, iteration, sharded=sharded)
        if sharded:
            save_shards = runner.strategy.save_shards
            write_sharded_checkpoint(
                state, work_dir, save_shards=save_shards, max_keep=self.max_keep
            )
        elif is_main_process():
            write_checkpoint(state, work_dir, max_keep=self.max_keep)
        if is_main_process():
            files = [file for file in path.rglob("*") if file.is_file()] if sharded else [path]
            megabytes = sum(file.stat().st_size for file in files) / 1e6
            seconds = time.perf_counter() - started
            runner.logger.info(f"saved {path.name} ({megabytes:.1f} MB in {seconds:.1f} s)")
        barrier()

    def _writes_shards(self, runner: Runner) -> bool:
        is_sharded: bool = runner.strategy.is_sharded
        return is_sharded if self.sharded is None else self.sharded


def check_sharded(sharded: bool | None, strategy: Strategy | type[Strategy]) -> None:
    """Check ``checkpoint.sharded`` against what a strategy can write.

    Raises:
        ValueError: If it can't.
    """
    if sharded and not strategy.is_sharded:
        raise ValueError(
            f"checkpoint.sharded=True: strategy '{strategy.name}' keeps the model whole in every "
            "process; remove it"
        )
    if sharded is False and not strategy.consolidates:
        raise ValueError(
            f"checkpoint.sharded=False: strategy '{strategy.name}' can't put its optimizer's state "
            "together; remove it (weights.safetensors at the end is whole anyway)"
        )
