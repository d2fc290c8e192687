"""What all engines share: building the parts of a run, and a model's state as one or in shards."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
from mmengine import _strategy as mmengine_strategy
from mmengine import registry as mmengine_registry
from mmengine.dist import is_main_process
from mmengine.logging import MMLogger
from torch import Tensor, nn

from covft.checkpoints.run import best_device
from covft.checkpoints.trainable import copy_into, trainable_state_dict, unwrapped
from covft.engine.optim_wrapper import AutocastOptimWrapper, checked_precision
from covft.engine.optimizer import build_optim_wrapper
from covft.engine.schedule import PARAM_SCHEDULERS
from covft.engine.strategies.launch import setup_distributed
from covft.registry import Registry

STRATEGIES = Registry(
    "strategy", parent=mmengine_registry.STRATEGIES, locations=["covft.engine.strategies"]
)
LOG_NAME = "train.log"


class Strategy(mmengine_strategy.SingleDeviceStrategy):
    """Where and how a model is trained; the loop, hooks and checkpoints know nothing more of it.

    A subclass overrides :meth:`_wrap_model`; one that shards also what saves and loads shards, and
    what puts a whole state together.

    Attributes:
        model: The model as the engine has wrapped it; its forward and backward are to be run by
            all processes alike.
        optim_wrapper: The optimizer, see :class:`~covft.engine.AutocastOptimWrapper`.
        precision: "bf16" or "fp32".
        device: Where a batch has to be.
    """

    #: What ``strategy.type`` and checkpoints call it.
    name: ClassVar[str]
    #: Whether it takes several processes.
    is_distributed: ClassVar[bool] = True
    #: Whether a process holds but its part of what is trained.
    is_sharded: ClassVar[bool] = False
    #: Whether the optimizer's state can be put together, for a checkpoint that others resume.
    consolidates: ClassVar[bool] = True

    _log_dir: str
    _work_dir: str
    _experiment_name: str
    dispatch_kwargs: dict[str, Any]
    optim_wrapper: Any
    precision: str

    def __init__(
        self, *, work_dir: str, experiment_name: str, env_kwargs: dict[str, Any] | None = None
    ) -> None:
        super().__init__(work_dir=work_dir, experiment_name=experiment_name, env_kwargs=env_kwargs)
        # Not that of a parameter: those may be offloaded to the CPU.
        self.device = torch.device(best_device())

    @classmethod
    def check(cls, options: Mapping[str, Any], stage: Mapping[str, Any]) -> None:
        """Find what of a stage's config doesn't go with this engine, before anything is built.

        Args:
            options: What the config sets of the strategy, without ``type``.
            stage: The stage's config.

        Raises:
            ValueError: If something doesn't; the message says what to change.
            ImportError: If the engine's package isn't installed.
        """

    def prepare(self, model: nn.Module, *, optim_wrapper: Any = None, **kwargs: Any) -> Any:
        """Wrap the model, then build optimizer and schedule over its parameters."""
        precision = (optim_wrapper or {}).get("precision", "auto")
        self.precision = checked_precision(precision, best_device())
        return super().prepare(model, optim_wrapper=optim_wrapper, **kwargs)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which the model computes as it does in training."""
        enabled = self.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def full_state(self) -> dict[str, Tensor]:
        """Return what training changes of the model, whole and on the CPU.

        All processes take part; all but the main one get nothing.
        """
        if not is_main_process():
            return {}
        return {
            name: value.detach().to("cpu", copy=True)
            for name, value in trainable_state_dict(self.model).items()
        }

    def full_optimizer_state(self) -> dict[str, Any]:
        """Return the optimizer's state dict, whole; all take part, the main process gets it."""
        return self.optim_wrapper.optimizer.state_dict() if is_main_process() else {}

    def load_full_state(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> None:
        """Take over what :meth:`full_state` and :meth:`full_optimizer_state` gave.

        Args:
            weights: Of the same names and shapes as this model's.
            optimizer: Whose groups hold the same parameters as this optimizer's. Only the moments
                are taken: learning rates, betas and decay are the config's.
        """
        copy_into(unwrapped(self.model).state_dict(), weights)
        self._load_optimizer(optimizer["state"])

    def save_shards(self, folder: Path) -> None:
        """Write this process's part of model and optimizer into ``folder``; all take part.

        Raises:
            ValueError: If nothing is sharded.
        """
        raise ValueError(
            f"strategy '{self.name}' shards nothing: remove checkpoint.sharded, or use another "
            "strategy"
        )

    def load_shards(self, folder: Path) -> None:
        """Take over what :meth:`save_shards` wrote; all take part.

        Raises:
            ValueError: If nothing is sharded, or the shards are of too different a run.
        """
        raise ValueError(f"strategy '{self.name}' shards nothing, but {folder} holds shards")

    def build_logger(self, log_level: int | str = "INFO", **kwargs: Any) -> MMLogger:
        """Log to one file in the work folder, which a resumed run continues."""
        # mmengine has made a folder named by the second this process was started in.
        with suppress(OSError):
            Path(self._log_dir).rmdir()
        self._log_dir = self._work_dir
        log_file = str(Path(self._work_dir) / LOG_NAME)
        return MMLogger.get_instance(
            self._experiment_name,
            logger_name="covft",
            log_file=log_file,
            log_level=log_level,
            file_mode="a",
            **kwargs,
        )

    def build_optim_wrapper(
        self, optim_wrapper: Mapping[str, Any], model: nn.Module
    ) -> AutocastOptimWrapper:
        """Build the optimizer by this project's rules."""
        return build_optim_wrapper(model, optim_wrapper)

    def build_param_scheduler(
        self, scheduler: Mapping[str, Any], optim_wrapper: AutocastOptimWrapper
    ) -> list[Any]:
        """Build the schedule for the length of the run."""
        max_iters = self.dispatch_kwargs["max_iters"]
        parts = {"optimizer": optim_wrapper, "max_iters": max_iters}
        return [PARAM_SCHEDULERS.build({**scheduler, **parts})]

    def _load_optimizer(self, state: Mapping[Any, Any]) -> None:
        optimizer: torch.optim.Optimizer = self.optim_wrapper.optimizer
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": dict(state), "param_groups": groups})

    def _setup_distributed(self, launcher: str = "pytorch", **kwargs: Any) -> None:
        setup_distributed(launcher)

    def _init_model_weights(self, model: nn.Module) -> nn.Module:
        # Weights are loaded when the model is built; initialising it again would lose them.
        return model
