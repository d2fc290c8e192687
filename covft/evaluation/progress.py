"""How far a benchmark is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from mmengine.logging import print_log
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 30.0


class InferenceProgress:
    """Shows how many questions are answered, and the time left.

    Args:
        name: What is asked, such as the benchmark's name.
        total: Questions to answer.
        done: How many of them were answered before.
        shown: Whether to show anything; of several processes, one does.
    """

    def __init__(self, name: str, *, total: int, done: int = 0, shown: bool = True) -> None:
        self._name, self._total, self._done, self._before = name, total, done, done
        self._shown = shown
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if shown and sys.stderr.isatty() and done < total:
            columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
            console = Console(stderr=True)
            self._bar = Progress(TextColumn(name), *columns, console=console)
            self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> InferenceProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._shown and self._done > self._before:
            print_log(self._line(), logger="current")

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def advance(self, count: int) -> None:
        """Tell that so many more questions are answered."""
        self._done += count
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
            return
        is_due = self._done < self._total and now - self._last_line > _SECONDS_BETWEEN_LINES
        if self._shown and is_due:
            self._last_line = now
            print_log(self._line(), logger="current")

    def _line(self) -> str:
        answered = self._done - self._before
        rate = answered / max(self.seconds, 1e-9)
        line = f"{self._name}: {self._done} of {self._total} questions answered, {rate:.2f} per s"
        if self._done == self._total:
            return f"{line}, in {_clock(self.seconds)}"
        return f"{line}, ETA {_clock((self._total - self._done) / rate)}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
