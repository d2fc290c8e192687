"""How far a run is: a bar on a terminal, a line every few steps elsewhere and in the log file."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmengine.dist import is_main_process, master_only
from mmengine.hooks import Hook
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from covft.registry import HOOKS

if TYPE_CHECKING:
    from covft.engine.runner import Runner

#: Steps that the time left is estimated from.
_WINDOW = 50


@HOOKS.register_module()
class ProgressHook(Hook):
    """Shows step, loss, learning rate, speed, memory and the time left.

    Args:
        interval: Steps between lines in the log; each tells the mean loss of the steps since the
            one before it.

    Raises:
        ValueError: If ``interval`` is below 1.
    """

    priority = "BELOW_NORMAL"

    def __init__(self, *, interval: int = 10) -> None:
        if interval < 1:
            raise ValueError(f"ProgressHook: interval must be at least 1, got {interval}")
        self.interval = interval
        self._recent: list[Mapping[str, Any]] = []
        self._ends: deque[float] = deque(maxlen=_WINDOW + 1)
        self._bar: _Bar | None = None

    @master_only
    def before_train(self, runner: Runner) -> None:
        """Start the clock, and the bar if somebody is looking."""
        self._ends.append(time.perf_counter())
        if sys.stderr.isatty():
            self._bar = _Bar(runner.logger, done=runner.iter, total=runner.max_iters)

    @master_only
    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Show the step."""
        self._ends.append(time.perf_counter())
        self._recent.append(outputs)
        step = batch_idx + 1
        is_last = step == runner.max_iters
        seconds_left = (runner.max_iters - step) * self._seconds_per_step()
        if self._bar is not None:
            self._bar.update(step, f"ETA {_clock(seconds_left)}  {self._short(outputs)}")
        if step % self.interval == 0 or is_last:
            width = len(str(runner.max_iters))
            line = (
                f"step {step:>{width}}/{runner.max_iters}  {self._numbers(self._recent)}  "
                f"ETA {_clock(seconds_left)}"
            )
            runner.logger.info(line, extra={"is_progress": True})
            self._recent = []

    def on_exit(self, runner: Runner) -> None:
        """Give the terminal back, also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _seconds_per_step(self) -> float:
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)

    @staticmethod
    def _short(outputs: Mapping[str, Any]) -> str:
        """Format what fits beside a bar in 80 columns; of several learning rates, the highest."""
        lr = max(value for name, value in outputs.items() if name.split("/")[0] == "lr")
        speed = outputs["input_tokens_per_second"]
        return f"loss {outputs['loss']:.3f}  lr {lr:.1e}  {speed:.0f} tok/s"

    @staticmethod
    def _numbers(steps: list[Mapping[str, Any]]) -> str:
        """Format the mean over ``steps``; learning rates are those of the last one."""
        used = [outputs for outputs in steps if "skipped" not in outputs]
        seconds = sum(outputs["seconds"] for outputs in steps)
        waiting = sum(outputs["data_seconds"] for outputs in steps)
        parts = ["loss -"]
        if used:
            loss = sum(outputs["loss"] for outputs in used) / len(used)
            norm = sum(outputs["grad_norm"] for outputs in used) / len(used)
            parts = [f"loss {loss:.4f}", f"grad {norm:.3g}"]
        if len(used) < len(steps):
            parts.append(f"skipped {len(steps) - len(used)}")
        parts += [f"{k} {v:.2e}" for k, v in steps[-1].items() if k.split("/")[0] == "lr"]
        parts += _speed(steps, seconds)
        parts.append(f"{seconds / len(steps):.3g} s/step (data {waiting / seconds:.0%})")
        return "  ".join(parts)


def _speed(steps: list[Mapping[str, Any]], seconds: float) -> list[str]:
    """Format what :class:`~covft.engine.ThroughputHook` found, as means over the time of steps."""

    def mean(name: str) -> float:
        return sum(outputs[name] * outputs["seconds"] for outputs in steps) / seconds

    parts = [f"{mean('input_tokens_per_second'):.0f} tok/s"]
    parts.append(f"{mean('samples_per_second'):.3g} samples/s")
    if "tflops_per_device" in steps[-1]:
        share = f" ({mean('mfu'):.0%} MFU)" if "mfu" in steps[-1] else ""
        parts.append(f"{mean('tflops_per_device'):.3g} TFLOP/s{share}")
    if "peak_memory_gib" in steps[-1]:
        parts.append(f"{steps[-1]['peak_memory_gib']:.3g} GiB")
    return parts


class _Bar:
    """A progress bar on stderr that log lines scroll past."""

    def __init__(self, logger: logging.Logger, *, done: int, total: int) -> None:
        assert is_main_process()
        columns = (BarColumn(bar_width=16), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._progress.start()
        self._task = self._progress.add_task("", total=total, completed=done)
        # The logger holds on to the stdout of its start, which rich has replaced by now.
        self._streams = [
            handler
            for handler in logger.handlers
            if isinstance(handler, logging.StreamHandler)
            and not isinstance(handler, logging.FileHandler)
        ]
        self._outputs = [handler.setStream(sys.stdout) for handler in self._streams]
        for handler in self._streams:
            handler.addFilter(_no_progress)

    def update(self, done: int, text: str) -> None:
        self._progress.update(self._task, completed=done, description=text)

    def stop(self) -> None:
        for handler, output in zip(self._streams, self._outputs, strict=True):
            handler.removeFilter(_no_progress)
            if output is not None:
                handler.setStream(output)
        self._progress.stop()


def _no_progress(record: logging.LogRecord) -> bool:
    """Keep the lines that the bar shows anyway out of the terminal."""
    return not getattr(record, "is_progress", False)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
