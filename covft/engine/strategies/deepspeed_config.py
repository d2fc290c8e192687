"""What strategies "zero2" and "zero3" make of a config, and what they refuse in it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from covft.engine.optim_wrapper import AutocastOptimWrapper
from covft.registry import nearest

#: Optimizers that treat every element alike: ZeRO gives them slices of all parameters in a row.
OPTIMIZERS = ("AdamW", "Adam", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop", "SGD")
PLACES = ("none", "cpu")
DTYPES = ("auto", "float32", "bfloat16")
#: The parts of DeepSpeed's config that a run may set: those that don't change what is trained.
RAW_KEYS = (
    "zero_optimization",
    "comms_logger",
    "flops_profiler",
    "memory_breakdown",
    "wall_clock_breakdown",
)
#: Of part zero_optimization, what a run sets by the strategy's own options alone.
_OWN_OPTIONS = {
    "offload_optimizer": "offload_optimizer",
    "offload_param": "offload_param",
    "cpu_offload": "offload_optimizer",  # the names that DeepSpeed had before
    "cpu_offload_param": "offload_param",
    "cpu_offload_use_pin_memory": "offload_optimizer",
}


def engine_config(
    stage: int,
    *,
    offload_optimizer: str = "none",
    offload_param: str = "none",
    reduce_bucket_size: int = 100_000_000,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what of DeepSpeed's config doesn't depend on model and optimizer.

    Args:
        stage: 2 or 3.
        offload_optimizer: The strategies' option; likewise what follows.
        offload_param: See there.
        reduce_bucket_size: See there.
        config: See there.

    Raises:
        ValueError: If an option is unknown, or ``config`` sets what is decided elsewhere.
        ImportError: If DeepSpeed isn't installed.
    """
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": reduce_bucket_size}
    if reduce_bucket_size < 1:
        raise ValueError(f"strategy.reduce_bucket_size must be positive, got {reduce_bucket_size}")
    if checked_choice("offload_optimizer", offload_optimizer, PLACES) != "none":
        zero["offload_optimizer"] = {"device": offload_optimizer}
    if checked_choice("offload_param", offload_param, PLACES) != "none":
        if stage < 3:
            raise ValueError(
                "strategy.offload_param is an option of 'zero3': ZeRO-2 keeps the whole model on "
                "every GPU; remove it, or change strategy.type"
            )
        zero["offload_param"] = {"device": offload_param}
    ours = {
        # The loop counts micro-batches, and has divided the loss by the step's tokens.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        # With the optimizer offloaded: torch's fused one on the CPU, for which nothing is compiled.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    merged = _with_raw(ours, config or {})
    # It says what it doesn't know or can't take, and is built by the engine once more.
    checker = import_part("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    try:
        checker(**merged["zero_optimization"])
    except ValueError as error:
        raise ValueError(f"strategy.config.zero_optimization: {error}") from None
    return merged


def _with_raw(ours: dict[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """Add a config's own options of DeepSpeed, which may not touch ours."""
    for key in raw:
        if key not in RAW_KEYS:
            raise ValueError(
                f"strategy.config['{key}']: a run may set the parts {', '.join(RAW_KEYS)} of "
                "DeepSpeed's config; precision, optimizer, schedule, clipping and batches are set "
                "in optim_wrapper, param_scheduler, train_dataloader and train_cfg"
            )
    added, decided = raw.get("zero_optimization"), ours["zero_optimization"]
    for key in added if isinstance(added, Mapping) else ():
        where = f"strategy.config.zero_optimization.{key}"
        if key in _OWN_OPTIONS and key not in decided:
            raise ValueError(
                f"{where} is decided by the strategy; set strategy.{_OWN_OPTIONS[key]}='cpu' "
                "instead, which checks that the run can do it"
            )
        if key.startswith("zero_quantized_"):
            raise ValueError(
                f"{where} would round weights or gradients to fewer bits, and so change what is "
                "trained; remove it (strategy.comm_dtype sets the type of communication)"
            )
    return _merged(ours, raw, where="strategy.config")


def _merged(ours: Mapping[str, Any], added: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in added.items():
        if isinstance(ours.get(key), Mapping) and isinstance(value, Mapping):
            merged[key] = _merged(ours[key], value, where=f"{where}.{key}")
        elif key in ours:
            raise ValueError(
                f"{where}.{key} is decided by the strategy ({ours[key]!r}); use its own options "
                "instead: type, offload_optimizer, offload_param, comm_dtype, reduce_bucket_size"
            )
        else:
            merged[key] = value
    return merged


def checked_choice(option: str, value: str, choices: tuple[str, ...]) -> str:
    """Return ``value``, or refuse it if it isn't one of the choices."""
    if value not in choices:
        raise ValueError(f"strategy.{option} '{value}' is unknown; {nearest(value, choices)}")
    return value


def check_wrapper(cfg: Mapping[str, Any]) -> None:
    """Refuse an optimizer's wrapper of another kind: the strategy brings its own."""
    if cfg.get("type") not in (None, "AutocastOptimWrapper", AutocastOptimWrapper):
        raise ValueError(
            f"optim_wrapper.type {cfg['type']!r} can't run under ZeRO, which steps through "
            "DeepSpeed; remove it"
        )


def check_optimizer(kind: str) -> None:
    """Refuse an optimizer that needs to know where a parameter begins."""
    if kind not in OPTIMIZERS:
        raise ValueError(
            f"optim_wrapper.optimizer '{kind}' can't run under ZeRO, which keeps float32 weights "
            "and steps flat slices of many parameters at once: optimizers with 8-bit moments, "
            "16-bit weights or a rule per matrix need the parameters as they are. Use one of "
            f"{', '.join(OPTIMIZERS)} (the moments are in partitions anyway), or strategy 'fsdp2'"
        )


def check_comm_dtype(comm_dtype: str, precision: str) -> None:
    """Refuse a type of communication that would be ignored."""
    if comm_dtype == "bfloat16" and precision == "fp32":
        raise ValueError(
            "strategy.comm_dtype='bfloat16' is for layers that run in bfloat16, but the precision "
            "is fp32 (optim_wrapper.precision; 'auto' is fp32 where bfloat16 isn't native); remove "
            "one of them"
        )


def check_parameters(model: nn.Module, *, stage: int) -> None:
    """Refuse parameters of types that ZeRO can't flatten, or not without changing the numbers."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ValueError(
                f"strategy 'zero{stage}' trains float32 weights, but {name} is "
                f"{str(parameter.dtype).removeprefix('torch.')}; set the part's dtype='float32' "
                "(the forward runs in bfloat16 by optim_wrapper.precision anyway), or use 'fsdp2'"
            )
        if stage == 3 and not parameter.is_floating_point():
            raise ValueError(
                f"strategy 'zero3' can't partition quantised weights such as {name}; remove "
                "model.llm.quantization, or use strategy 'zero2'"
            )


def linear_classes(modules: Iterable[nn.Module]) -> list[str]:
    """Return the importable classes of layers whose weights autocast casts, with their modules."""
    kinds = {type(module) for module in modules if isinstance(module, (nn.Linear, nn.Conv2d))}
    return sorted(f"{k.__module__}.{k.__name__}" for k in kinds if k.__qualname__ == k.__name__)


def import_part(module: str) -> Any:
    """Import a part of DeepSpeed.

    Raises:
        ImportError: If it isn't installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError(
            "strategies 'zero2' and 'zero3' need the package deepspeed: pip install -e '.[train]'"
        )
    return importlib.import_module(module)
