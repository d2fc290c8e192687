"""Where a model is trained: one device, or several processes with replicas of it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from mmengine import _strategy as mmengine_strategy
from mmengine import registry as mmengine_registry
from mmengine.dist import is_distributed
from mmengine.logging import MMLogger
from torch import distributed, nn

from covft.checkpoints.run import best_device
from covft.engine.optimizer import AutocastOptimWrapper, build_optim_wrapper
from covft.engine.schedule import PARAM_SCHEDULERS
from covft.registry import Registry, nearest

STRATEGIES = Registry(
    "strategy", parent=mmengine_registry.STRATEGIES, locations=["covft.engine.strategy"]
)
LAUNCHERS = ("none", "pytorch", "slurm")
LOG_NAME = "train.log"


def setup_distributed(launcher: str) -> None:
    """Join the process group that the launcher started; nothing to do for "none".

    NCCL where there are GPUs, gloo otherwise. Call it before the dataloader is built, which needs
    to know this process's rank; a second call does nothing.

    Args:
        launcher: "none", "pytorch" (torchrun) or "slurm" (srun).

    Raises:
        ValueError: If the launcher is unknown, or didn't set its environment variables.
    """
    if launcher not in LAUNCHERS:
        raise ValueError(f"launcher '{launcher}' is unknown; {nearest(launcher, LAUNCHERS)}")
    if launcher == "none" or is_distributed():
        return
    if launcher == "slurm":
        _translate_slurm_environment()
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in os.environ]
    if missing:
        raise ValueError(
            f"launcher '{launcher}' needs the environment variables {', '.join(missing)}; start "
            "the script through torchrun or srun, or use launcher 'none'"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


class _OwnParts:
    """What all strategies here change in mmengine's: how parts are built, and where logs go."""

    _log_dir: str
    _work_dir: str
    _experiment_name: str
    dispatch_kwargs: dict[str, Any]

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

    def _init_model_weights(self, model: nn.Module) -> nn.Module:
        # Weights are loaded when the model is built; initialising it again would lose them.
        return model


@STRATEGIES.register_module()
class SingleDeviceStrategy(_OwnParts, mmengine_strategy.SingleDeviceStrategy):
    """One process: the GPU if there is one, or the CPU."""

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        return model.to(best_device())


@STRATEGIES.register_module()
class DDPStrategy(_OwnParts, mmengine_strategy.DDPStrategy):
    """One replica of the model per process, on GPUs through NCCL or on CPUs through gloo."""

    def _setup_distributed(self, launcher: str = "pytorch", **kwargs: Any) -> None:
        setup_distributed(launcher)

    def _wrap_model(self, model: nn.Module) -> nn.parallel.DistributedDataParallel:
        # A text-only micro-batch doesn't reach the vision tower, so that the parameters a backward
        # finds differ from rank to rank.
        return nn.parallel.DistributedDataParallel(
            model.to(best_device()),
            device_ids=[torch.cuda.current_device()] if torch.cuda.is_available() else None,
            broadcast_buffers=False,
            find_unused_parameters=True,
        )


def _translate_slurm_environment() -> None:
    """Set torchrun's variables from those of srun."""
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    for name, slurm_name in names.items():
        if slurm_name in os.environ:
            os.environ[name] = os.environ[slurm_name]
    os.environ.setdefault("MASTER_PORT", "29500")
    if "MASTER_ADDR" not in os.environ and shutil.which("scontrol"):
        nodes = os.environ.get("SLURM_JOB_NODELIST", "")
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
        os.environ["MASTER_ADDR"] = listed.stdout.split()[0]
