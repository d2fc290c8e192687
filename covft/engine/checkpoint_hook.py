"""The hook that writes checkpoints, and the trained weights at the end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmengine.dist import barrier, is_main_process
from mmengine.hooks import Hook

import covft
from covft.checkpoints.trainable import WEIGHTS_NAME, save_weights
from covft.engine.checkpoint import checkpoint_path, collect_state, write_checkpoint
from covft.registry import HOOKS

if TYPE_CHECKING:
    from covft.engine.runner import Runner


@HOOKS.register_module()
class CheckpointHook(Hook):
    """Writes ``iter_N.pth`` every ``interval`` steps and ``weights.safetensors`` at the end.

    Args:
        interval: Optimizer steps between checkpoints.
        max_keep: How many of the newest are kept. With 1, a damaged file leaves nothing to resume
            from.
        save_last: Whether the end of the run gets a checkpoint too, from which a longer run could
            continue. The weights are written anyway.

    Raises:
        ValueError: If ``interval`` or ``max_keep`` is below 1.
    """

    # After every other hook, so that the state it saves is that at the end of the step.
    priority = "VERY_LOW"

    def __init__(self, *, interval: int = 500, max_keep: int = 2, save_last: bool = True) -> None:
        if interval < 1 or max_keep < 1:
            raise ValueError(
                f"CheckpointHook: interval and max_keep must be at least 1, got {interval} and "
                f"{max_keep}"
            )
        self.interval = interval
        self.max_keep = max_keep
        self.save_last = save_last

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint if it is time for one."""
        if (runner.iter + 1) % self.interval == 0:
            self._save(runner, runner.iter + 1)

    def after_train(self, runner: Runner) -> None:
        """Write the last checkpoint, and the weights if the run is finished."""
        work_dir = Path(runner.work_dir)
        if self.save_last and not checkpoint_path(work_dir, runner.iter).exists():
            self._save(runner, runner.iter)
        if is_main_process():
            metadata = {"covft_version": covft.__version__, "iter": str(runner.iter)}
            metadata["config"] = runner.config_text
            save_weights(runner.model, work_dir / WEIGHTS_NAME, metadata=metadata)
            runner.logger.info(f"trained weights: {work_dir / WEIGHTS_NAME}")
        barrier()

    def _save(self, runner: Runner, iteration: int) -> None:
        started = time.perf_counter()
        state = collect_state(runner, iteration)
        runner.call_hook("before_save_checkpoint", checkpoint=state)
        if is_main_process():
            path = write_checkpoint(state, Path(runner.work_dir), max_keep=self.max_keep)
            megabytes = path.stat().st_size / 1e6
            seconds = time.perf_counter() - started
            runner.logger.info(f"saved {path.name} ({megabytes:.1f} MB in {seconds:.1f} s)")
        barrier()
