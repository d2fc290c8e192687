"""DeepSpeed's ZeRO (Rajbhandari et al., SC 2020), stages 2 and 3, over NCCL or gloo.

The model stays in float32 and is autocast, as under the other strategies, so that one config gives
the same run under all of them; DeepSpeed's own bf16 mode, which rounds the weights themselves,
isn't used. Its checkpoints are pickles: resume from places that are trusted.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from mmengine.dist import get_world_size, is_main_process
from torch import Tensor, nn

from covft.checkpoints.trainable import trainable_state_dict, unwrapped
from covft.engine.optim_wrapper import AutocastOptimWrapper
from covft.engine.strategies.base import STRATEGIES, Strategy
from covft.engine.strategies.deepspeed_config import (
    DTYPES,
    check_comm_dtype,
    check_optimizer,
    check_parameters,
    check_wrapper,
    checked_choice,
    engine_config,
    import_part,
    linear_classes,
)
from covft.engine.strategies.deepspeed_optim import ZeROOptimWrapper

#: The folder inside of a checkpoint's ``shards`` that DeepSpeed makes.
_TAG = "zero"


class DeepSpeedStrategy(Strategy):
    """What both stages have in common.

    Args:
        offload_optimizer: "cpu" keeps the optimizer's weights and moments in the host's memory, and
            steps there, by torch's own optimizer; "none" leaves them on the GPU.
        offload_param: "cpu" keeps the partitions of the model's weights there too; ZeRO-3 only.
        comm_dtype: In which gradients are averaged, and under ZeRO-3 weights gathered, of the
            layers that autocast runs in bfloat16: "float32", or with half the traffic "bfloat16".
            "auto" is "float32" under ZeRO-2, which then averages like DDP, and "bfloat16" under
            ZeRO-3, which would otherwise gather weights that are rounded right after.
        reduce_bucket_size: Gradients averaged at once, in elements; they are buffered on the GPU.
        config: More of DeepSpeed's own options, such as
            ``dict(zero_optimization=dict(overlap_comm=True))``.
        work_dir: Given by the engine; likewise what follows.
        experiment_name: See ``work_dir``.
        env_kwargs: See ``work_dir``.

    Raises:
        ValueError: If an option is unknown, or ``config`` sets what is decided elsewhere.
        ImportError: If DeepSpeed isn't installed.
    """

    stage: ClassVar[int]
    is_sharded = True
    consolidates = False

    def __init__(
        self,
        *,
        offload_optimizer: str = "none",
        offload_param: str = "none",
        comm_dtype: str = "auto",
        reduce_bucket_size: int = 100_000_000,
        config: Mapping[str, Any] | None = None,
        work_dir: str,
        experiment_name: str,
        env_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.comm_dtype = checked_choice("comm_dtype", comm_dtype, DTYPES)
        self.engine_config = engine_config(
            self.stage,
            offload_optimizer=offload_optimizer,
            offload_param=offload_param,
            reduce_bucket_size=reduce_bucket_size,
            config=config,
        )
        super().__init__(work_dir=work_dir, experiment_name=experiment_name, env_kwargs=env_kwargs)

    @classmethod
    def check(cls, options: Mapping[str, Any], stage: Mapping[str, Any]) -> None:
        """Find what of a stage's config ZeRO can't do, see :class:`Strategy`."""
        own = dict(options)
        comm_dtype = checked_choice("comm_dtype", own.pop("comm_dtype", "auto"), DTYPES)
        engine_config(cls.stage, **own)
        cfg = stage.get("optim_wrapper") or {}
        check_wrapper(cfg)
        kind = (cfg.get("optimizer") or {}).get("type")
        check_optimizer(kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind)))
        check_comm_dtype(comm_dtype, cfg.get("precision", "auto"))

    def build_optim_wrapper(
        self, optim_wrapper: Mapping[str, Any], model: nn.Module
    ) -> AutocastOptimWrapper:
        """Build optimizer and groups as everywhere; then let DeepSpeed partition them."""
        check_wrapper(optim_wrapper)
        check_comm_dtype(self.comm_dtype, self.precision)
        check_parameters(model, stage=self.stage)
        wrapper = super().build_optim_wrapper({**optim_wrapper, "type": ZeROOptimWrapper}, model)
        assert isinstance(wrapper, ZeROOptimWrapper)
        check_optimizer(type(wrapper.optimizer).__name__)
        config = {**self.engine_config, "gradient_clipping": wrapper.max_norm or 0.0}
        if self.precision == "bf16":
            config["torch_autocast"] = self._autocast_config(model)
        _prepare_deepspeed()
        engine, *_ = import_part("deepspeed").initialize(
            model=model, optimizer=wrapper.optimizer, config=config
        )
        wrapper.attach(engine)
        self.model = engine
        return wrapper

    def full_state(self) -> dict[str, Tensor]:
        """Put together what training changes of the model, a tensor at a time."""
        gather = import_part("deepspeed.utils").safe_get_full_fp32_param
        parameters = dict(unwrapped(self.model).named_parameters(remove_duplicate=False))
        state = {}
        for name, value in trainable_state_dict(self.model).items():
            if name in parameters:
                value = gather(parameters[name])
            if is_main_process():
                state[name] = value.detach().to("cpu", copy=True)
        return state

    def save_shards(self, folder: Path) -> None:
        """Write this process's part by DeepSpeed, without what is frozen."""
        self.model.save_checkpoint(
            str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True
        )

    def load_shards(self, folder: Path) -> None:
        """Read this process's part by DeepSpeed.

        Raises:
            ValueError: If another number of processes has written them.
        """
        written = len(list((folder / _TAG).glob("*_optim_states.pt")))
        if written != get_world_size():
            raise ValueError(
                f"{folder} was written by {written} processes, and there are {get_world_size()} "
                f"now: the shards of strategy '{self.name}' fit as many only. Resume with "
                f"{written}; where the number is to change, train with strategy 'fsdp2'"
            )
        groups = self.optim_wrapper.optimizer.param_groups
        own = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        # Not strict, since frozen parameters are left out; names and shapes were checked before.
        self.model.load_checkpoint(str(folder), tag=_TAG, load_module_strict=False)
        # Only the moments are taken: learning rates, betas and decay are the config's.
        for group, options in zip(self.optim_wrapper.optimizer.param_groups, own, strict=True):
            group.update(options)

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        return model.to(self.device)

    def _autocast_config(self, model: nn.Module) -> dict[str, Any]:
        default = "bfloat16" if self.stage == 3 else "float32"
        comm_dtype = default if self.comm_dtype == "auto" else self.comm_dtype
        # DeepSpeed's name for the layers whose parameters travel in autocast's type.
        safe = linear_classes(model.modules()) if comm_dtype == "bfloat16" else []
        return {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": safe}


@STRATEGIES.register_module(name=["zero2", "ZeRO2Strategy"])
class ZeRO2Strategy(DeepSpeedStrategy):
    """Gradients and optimizer in partitions, the model whole: see :class:`DeepSpeedStrategy`."""

    name = "zero2"
    stage = 2


@STRATEGIES.register_module(name=["zero3", "ZeRO3Strategy"])
class ZeRO3Strategy(DeepSpeedStrategy):
    """The model in partitions too, gathered layer by layer: see :class:`DeepSpeedStrategy`."""

    name = "zero3"
    stage = 3

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute as in training, also by other methods than the engine's forward.

        Weights that a module's parent uses are gathered when they are looked up, which DeepSpeed
        allows in its own forward only, and remembers from then on.
        """
        modules = list(unwrapped(self.model).modules())
        for module in modules:
            module._parameters._in_forward = True  # type: ignore[attr-defined]
        try:
            with super().autocast():
                yield
        finally:
            for module in modules:
                module._parameters._in_forward = False  # type: ignore[attr-defined]


def _prepare_deepspeed() -> None:
    """Make DeepSpeed ready to use this process group, quickly and quietly."""
    import_part("deepspeed.utils").logger.addFilter(_is_news)
    # It calls collectives by names that torch is renaming, at every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if not torch.cuda.is_available():
        # A collective in C++ among processes on one CPU, which takes a minute to be compiled.
        import_part("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed never empties it, and so would keep the model of a stage before alive.
    import_part("deepspeed.runtime.zero.parameter_offload").FWD_MODULE_STACK.clear()


def _is_news(record: logging.LogRecord) -> bool:
    """Tell whether a message of DeepSpeed's is worth a line.

    One warns that ZeRO-3 can't hook into the backward pass of modules that give or take a
    dataclass. Here that is the context, which has no gradient, and the loss of the whole model,
    which uses no weights but through its parts.
    """
    return "unknown inputs or outputs type" not in record.getMessage()
