"""Where a training step's time goes: forward, backward, optimizer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

_PARTS = ("forward", "backward", "optimizer")


class StepTimer:
    """Adds up the time of parts of steps, on a GPU by events in its stream.

    Args:
        device: Where the steps are computed.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._name: str | None = None
        self._steps: dict[str, list[list[tuple[str, Any, Any]]]] = {}
        self._begun: list[Any] = []

    def start(self, name: str | None) -> None:
        """Count what follows as a step of ``name``'s; None counts nothing."""
        self._name = name
        if name is not None:
            self._steps.setdefault(name, []).append([])

    def watch_forward(self, model: nn.Module) -> None:
        """Count calls of ``model`` as "forward"."""

        def before(module: nn.Module, inputs: Any) -> None:
            self._begun.append(self._now())

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            self._add("forward", self._begun.pop())

        model.register_forward_pre_hook(before)
        model.register_forward_hook(after)

    @contextmanager
    def part(self, part: str) -> Iterator[None]:
        """Count what is done meanwhile as ``part``."""
        begun = self._now()
        yield
        self._add(part, begun)

    def shares(self, name: str, seconds: Sequence[float]) -> dict[str, float]:
        """Return the shares that the parts had in a step, medians over the steps.

        Args:
            name: Whose steps; the device must have finished them.
            seconds: How long each took.
        """
        steps = self._steps.get(name, ())[: len(seconds)]
        shares = [self._shares(*both) for both in zip(steps, seconds, strict=True)]
        return {part: median(step[part] for step in shares) for part in (*_PARTS, "other")}

    def _shares(self, marks: Sequence[tuple[str, Any, Any]], seconds: float) -> dict[str, float]:
        sums = dict.fromkeys(_PARTS, 0.0)
        for part, begun, ended in marks:
            sums[part] += begun.elapsed_time(ended) / 1000 if self._on_gpu else ended - begun
        shares = {part: value / seconds for part, value in sums.items()}
        return {**shares, "other": max(0.0, 1 - sum(shares.values()))}

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add(self, part: str, begun: Any) -> None:
        if self._name is not None:
            self._steps[self._name][-1].append((part, begun, self._now()))


class TimedOptimWrapper:
    """An engine's optimizer wrapper whose calls are timed.

    Args:
        wrapper: The engine's.
        timer: Who counts.
    """

    def __init__(self, wrapper: Any, timer: StepTimer) -> None:
        self._wrapper, self._timer = wrapper, timer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)

    def micro_batch(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """See :class:`~covft.engine.AutocastOptimWrapper`."""
        context: AbstractContextManager[None] = self._wrapper.micro_batch(model, last=last)
        return context

    def backward(self, loss: Tensor) -> None:
        """Count the backward pass."""
        with self._timer.part("backward"):
            self._wrapper.backward(loss)

    def clip_gradients(self) -> Tensor:
        """Count clipping as the optimizer's."""
        with self._timer.part("optimizer"):
            norm: Tensor = self._wrapper.clip_gradients()
        return norm

    def step(self) -> None:
        """Count the optimizer's step."""
        with self._timer.part("optimizer"):
            self._wrapper.step()

    def zero_grad(self) -> None:
        """Count the release of gradients as the optimizer's."""
        with self._timer.part("optimizer"):
            self._wrapper.zero_grad()
