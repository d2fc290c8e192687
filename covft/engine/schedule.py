"""Learning-rate schedules; they count optimizer steps."""

from __future__ import annotations

import math
from typing import Any

from mmengine.optim import BaseOptimWrapper, _ParamScheduler

from covft.registry import Registry

PARAM_SCHEDULERS = Registry("param scheduler", locations=["covft.engine.schedule"])


@PARAM_SCHEDULERS.register_module()
class CosineWarmup(_ParamScheduler):
    """Linear warm-up, then a cosine down to ``min_lr_ratio`` of each group's learning rate.

    With W warm-up steps of a run of N, step s (from 0) has the factor (s + 1) / (W + 1) up to
    s = W, where it is 1, and then r + (1 - r) (1 + cos(pi (s - W) / (N - W))) / 2. So neither the
    first step nor the last one is spent on a learning rate of zero. The value is computed from the
    step alone: rounding doesn't add up, and a resumed run follows the same curve.

    Args:
        optimizer: Whose groups' ``lr`` is set; their values now are the peaks.
        max_iters: Length N of the run in optimizer steps; the engine gives it.
        warmup_ratio: Warm-up as a share of the run, rounded up; 0.03 if neither is given.
        warmup_iters: Warm-up in steps instead.
        min_lr_ratio: Where the cosine ends, as a share r of the peak; 1 keeps the peak.

    Raises:
        ValueError: If the warm-up doesn't fit in the run, or a share isn't one.
    """

    _global_step: int

    def __init__(
        self,
        optimizer: BaseOptimWrapper,
        *,
        max_iters: int,
        warmup_ratio: float | None = None,
        warmup_iters: int | None = None,
        min_lr_ratio: float = 0.0,
    ) -> None:
        self.warmup = _warmup_steps(max_iters, warmup_ratio, warmup_iters)
        if not 0 <= min_lr_ratio <= 1:
            raise ValueError(f"param_scheduler.min_lr_ratio must lie in [0, 1], got {min_lr_ratio}")
        self.max_iters = max_iters
        self.min_lr_ratio = min_lr_ratio
        super().__init__(optimizer, "lr", by_epoch=False)

    def factor(self, step: int) -> float:
        """Return the share of the peak learning rate at ``step``, counted from 0."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        progress = min((step - self.warmup) / (self.max_iters - self.warmup), 1.0)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2

    def step(self) -> None:
        """Advance by one step and set the groups' learning rates."""
        self._go_to(self._global_step + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the position; the curve itself comes from the config."""
        return {"global_step": self._global_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a saved position of the curve."""
        self._go_to(state_dict["global_step"])

    def describe(self) -> str:
        """Return the planned curve in one line."""
        last = self.factor(self.max_iters - 1)
        return (
            f"{self.warmup} warm-up steps from {self.factor(0):.3g} of the peak, then cosine to "
            f"{last:.3g} at step {self.max_iters}"
        )

    def _go_to(self, step: int) -> None:
        self._global_step = self.last_step = step
        factor = self.factor(step)
        self._last_value = [base * factor for base in self.base_values]
        for group, value in zip(self.optimizer.param_groups, self._last_value, strict=True):
            group["lr"] = value


def _warmup_steps(max_iters: int, ratio: float | None, iters: int | None) -> int:
    if ratio is not None and iters is not None:
        raise ValueError(
            f"param_scheduler: give warmup_ratio ({ratio}) or warmup_iters ({iters}), not both"
        )
    if iters is None:
        ratio = 0.03 if ratio is None else ratio
        if not 0 <= ratio < 1:
            raise ValueError(f"param_scheduler.warmup_ratio must lie in [0, 1), got {ratio}")
        return min(math.ceil(ratio * max_iters), max_iters - 1)
    if not 0 <= iters < max_iters:
        raise ValueError(
            f"a warm-up of {iters} steps doesn't fit in a run of {max_iters} steps; "
            "change param_scheduler.warmup_iters or train_cfg"
        )
    return iters
