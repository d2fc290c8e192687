"""Optimizer, schedule and runtime of an xtuner 0.2 config.

xtuner's iterations are micro-batches, whose gradients its optimizer wrapper accumulates; this
project's are optimizer steps. What is counted in iterations is divided accordingly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch.optim import SGD, Adam, AdamW

from covft.engine import CosineWarmup
from covft.interop.references import Reference
from covft.interop.section import Section, shown

_OPTIMIZERS: dict[str, Any] = {
    "AdamW": AdamW,
    "Adam": Adam,
    "SGD": SGD,
    "AdamW8bit": "AdamW8bit",
    "PagedAdamW8bit": "PagedAdamW8bit",
}
#: What DeepSpeed's options are in xtuner, set from the rest of the config here, too.
_SET_ELSEWHERE = {
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "exclude_frozen_parameters": True,
}
_WRAPPERS = ("AmpOptimWrapper", "OptimWrapper", "DeepSpeedOptimWrapper")
_BACKENDS = ("TensorboardVisBackend", "WandbVisBackend", "MLflowVisBackend", "LocalVisBackend")


def convert_optimization(config: Section) -> dict[str, Any]:
    """Convert ``train_cfg``, ``optim_wrapper``, ``param_scheduler`` and the hooks.

    The hooks are converted here because their intervals depend on the gradient accumulation.

    Raises:
        ValueError: If the optimizer or the learning rate's curve has no counterpart.
    """
    train_cfg, wrapper = config.section("train_cfg"), config.section("optim_wrapper")
    if train_cfg is None or wrapper is None:
        missing = "train_cfg" if train_cfg is None else "optim_wrapper"
        raise ValueError(f"{missing} is missing")
    train_cfg.kind({"TrainLoop": None, "IterBasedTrainLoop": None, "EpochBasedTrainLoop": None})
    epochs, iters = train_cfg.take("max_epochs", None), train_cfg.take("max_iters", None)
    accumulation = wrapper.take("accumulative_counts", 1)
    if epochs is None:
        length = {"max_iters": _steps(train_cfg, "max_iters", iters, accumulation)}
    else:
        length = {"max_epochs": epochs}
    train_cfg.drop("val_interval", "evaluation comes after training, from config.evaluation")
    train_cfg.finish()
    optimizer, optim_wrapper = _optim_wrapper(wrapper)
    curve = _schedule(config, epochs=epochs, iters=iters, lr=optimizer["lr"])
    wrapper.finish()
    return {
        "train_cfg": {**length, "accumulation": accumulation},
        "optim_wrapper": {"optimizer": optimizer, **optim_wrapper},
        "param_scheduler": curve,
        **_hooks(config, accumulation),
    }


def convert_runtime(config: Section) -> dict[str, Any]:
    """Convert seed, visualizer, folder and the like."""
    converted: dict[str, Any] = {}
    randomness = config.section("randomness")
    seed = None if randomness is None else randomness.take("seed", None)
    converted["seed"] = 0 if seed is None else seed
    if randomness is not None:
        randomness.expect(deterministic=False)
        randomness.finish()
    backends = _backends(config.section("visualizer"))
    if backends:
        converted["visualizer"] = {"vis_backends": backends}
    if config.take("resume", False):
        config.note("resume", True, "use tools/train.py --resume")
    work_dir = config.take("work_dir", None)
    if work_dir:
        converted["work_dir"] = work_dir
    config.expect(log_level="INFO", launcher="none", runner_type="FlexibleRunner")
    # Where processes meet and how mmengine counts is this project's own affair.
    for key in ("env_cfg", "log_processor", "default_scope"):
        config.take(key, None)
    reason = "evaluation comes after training; name benchmarks in config.evaluation"
    for part in ("val", "test"):
        for key in ("dataloader", "cfg", "evaluator"):
            config.drop(f"{part}_{key}", reason)
    strategy = config.section("strategy")
    if strategy is not None:
        converted |= _strategy(strategy)
    return converted


def _strategy(strategy: Section) -> dict[str, Any]:
    """Return what names the engine, if it isn't the one that the launcher stands for."""
    names = ("SingleDeviceStrategy", "DDPStrategy", "FSDPStrategy", "DeepSpeedStrategy")
    name = strategy.kind({name: name for name in names})
    engine: dict[str, Any] = {}
    if name == "FSDPStrategy":
        engine = {"type": "fsdp2"}
    elif name == "DeepSpeedStrategy":
        engine = _deepspeed(strategy)
    strategy.finish()
    return {"strategy": engine} if engine else {}


def _deepspeed(strategy: Section) -> dict[str, Any]:
    zero = strategy.section("zero_optimization") or Section({}, "zero_optimization", [])
    stage = zero.take("stage", 0)
    if stage not in (2, 3):
        where = strategy.where("zero_optimization.stage")
        raise ValueError(f"{where} = {stage}: stages 2 and 3 have a counterpart here")
    engine = {"type": f"zero{stage}"}
    for key in ("offload_optimizer", "offload_param"):
        offload = zero.section(key)
        if offload is not None:
            engine[key] = offload.take("device", "none")
            offload.finish()
    zero.finish()
    for key in ("bf16", "fp16"):
        strategy.take(key, None)  # the optimizer wrapper's precision says it
    strategy.expect(**_SET_ELSEWHERE)
    return engine


def _steps(section: Section, key: str, iters: Any, accumulation: int) -> Any:
    """Return a number of micro-batches in optimizer steps, rounded up; noted if it changes."""
    # mmengine's -1 means never, and stays what it is.
    if not iters or iters < 0 or accumulation == 1:
        return iters
    steps = math.ceil(iters / accumulation)
    section.note(key, iters, f"micro-batches in xtuner: {steps} steps of {accumulation} here")
    return steps


def _optim_wrapper(wrapper: Section) -> tuple[dict[str, Any], dict[str, Any]]:
    kind = wrapper.kind({name: name for name in _WRAPPERS})
    optimizer = wrapper.section("optimizer")
    if optimizer is None:
        raise ValueError(f"{wrapper.where('optimizer')} is missing")
    converted = {"type": optimizer.kind(_OPTIMIZERS), "lr": optimizer.take("lr")}
    for key in ("betas", "eps", "momentum", "weight_decay"):
        if key in optimizer:
            converted[key] = optimizer.take(key)
    if converted.get("weight_decay"):
        optimizer.note("weight_decay", converted["weight_decay"], "not for norms and biases here")
    optimizer.finish()
    options: dict[str, Any] = {}
    clip = wrapper.section("clip_grad")
    if clip is not None:
        options["clip_grad"] = {"max_norm": float(clip.take("max_norm"))}
        clip.expect(error_if_nonfinite=False, norm_type=2)
        clip.finish()
    dtype = wrapper.take("dtype", "float16" if kind == "AmpOptimWrapper" else None)
    if dtype in (None, "bfloat16"):
        options["precision"] = "bf16" if dtype else "fp32"
    else:
        wrapper.note("dtype", dtype, "bfloat16 where the hardware has it (precision 'auto')")
    wrapper.take("loss_scale", None)  # of float16 alone
    return converted, options


def _schedule(
    config: Section, *, epochs: float | None, iters: int | None, lr: float
) -> dict[str, Any]:
    """Convert a linear warm-up and a cosine."""
    total = iters if epochs is None else epochs
    values = config.take("param_scheduler", None)
    if values is None:
        return {"type": CosineWarmup, "warmup_iters": 0, "min_lr_ratio": 1.0}
    values = [values] if isinstance(values, Mapping) else list(values)
    parts = {}
    for index, part in enumerate(values):
        section = Section(part, f"param_scheduler[{index}]", config.notes)
        parts[section.kind({name: name for name in ("LinearLR", "CosineAnnealingLR")})] = section
    cosine = parts.get("CosineAnnealingLR")
    if cosine is None or len(parts) < len(values) or total is None:
        raise ValueError(
            f"param_scheduler = {shown(values)}: only a LinearLR warm-up and a CosineAnnealingLR "
            "have a counterpart (CosineWarmup); replace it"
        )
    for section in parts.values():
        _check_unit(section, by_epoch=epochs is not None)
    converted: dict[str, Any] = {"type": CosineWarmup, "warmup_ratio": 0.0}
    linear = parts.get("LinearLR")
    if linear is not None:
        warmup = linear.take("end")
        if not 0 <= warmup < total:
            raise ValueError(
                f"{linear.where('end')} = {shown(warmup)}: the warm-up must end before the run "
                f"({total}); change it"
            )
        converted["warmup_ratio"] = warmup / total
        start = linear.take("start_factor", 1 / 3)
        linear.note("start_factor", start, "the warm-up's first step has 1 / (steps + 1)")
        linear.expect(begin=0)
    floor = cosine.take("eta_min", 0.0)
    if floor:
        converted["min_lr_ratio"] = floor / lr
    cosine.take("begin", None)  # the warm-up's end, or the start
    end = cosine.take("end", cosine.take("T_max", total))
    if end != total:
        cosine.note("end", end, f"the cosine ends with the run ({total})")
    for section in parts.values():
        section.take("convert_to_iter_based", None)
        section.finish()
    return converted


def _check_unit(section: Section, *, by_epoch: bool) -> None:
    """Refuse a part of the curve that isn't counted like the run's length."""
    found = section.take("by_epoch", True)  # mmengine's default
    if found != by_epoch:
        length, unit = ("max_epochs", "epochs") if by_epoch else ("max_iters", "iterations")
        raise ValueError(
            f"{section.where('by_epoch')} = {found}: train_cfg.{length} counts {unit}, so that "
            f"the share of the run isn't known; set by_epoch={by_epoch} and give the part's begin "
            f"and end in {unit}"
        )


def _hooks(config: Section, accumulation: int) -> dict[str, Any]:
    converted: dict[str, Any] = {}
    defaults = config.section("default_hooks")
    if defaults is not None:
        checkpoint, logger = defaults.section("checkpoint"), defaults.section("logger")
        if checkpoint is not None:
            converted["checkpoint"] = _checkpoint(checkpoint, accumulation)
        if logger is not None:
            logger.take("type", None)
            interval = _steps(logger, "interval", logger.take("interval", 10), accumulation)
            converted["logging"] = {"interval": interval}
            logger.expect(log_metric_by_epoch=False)
            logger.finish()
        for key in ("timer", "param_scheduler", "sampler_seed"):
            defaults.take(key, None)  # built in
        defaults.finish()
    for index, values in enumerate(config.take("custom_hooks", None) or ()):
        hook = Section(values, f"custom_hooks[{index}]", config.notes)
        kind = hook.take("type")
        name = kind.short_name if isinstance(kind, Reference) else kind
        if name == "EvaluateChatHook":
            every = hook.take("every_n_iters", None)
            every = _steps(hook, "every_n_iters", every, accumulation)
            if every:
                converted.setdefault("logging", {})["preview_interval"] = every
            inputs = hook.take("evaluation_inputs", None)
            hook.note("evaluation_inputs", inputs, "training samples are answered instead")
        elif name not in ("DatasetInfoHook", "ThroughputHook"):  # built in
            hook.note("type", kind, "not carried over")
    return converted


def _checkpoint(checkpoint: Section, accumulation: int) -> dict[str, Any]:
    checkpoint.take("type", None)
    interval = checkpoint.take("interval", 500)
    by_epoch = checkpoint.take("by_epoch", True)
    if not by_epoch:
        interval = _steps(checkpoint, "interval", interval, accumulation)
    converted = {"interval": interval}
    keep = checkpoint.take("max_keep_ckpts", -1)
    if keep > 0:
        converted["max_keep"] = keep
    else:
        checkpoint.note("max_keep_ckpts", keep, "the 2 newest are kept")
    if not checkpoint.take("save_optimizer", True):
        checkpoint.note("save_optimizer", False, "checkpoints can always be resumed from")
    if by_epoch:
        checkpoint.note("by_epoch", True, f"{converted['interval']} is taken as steps: change it")
    checkpoint.finish()
    return converted


def _backends(visualizer: Section | None) -> list[dict[str, str]]:
    if visualizer is None:
        return []
    visualizer.take("type", None)
    names = []
    for index, values in enumerate(visualizer.take("vis_backends", None) or ()):
        backend = Section(values, f"{visualizer.path}.vis_backends[{index}]", visualizer.notes)
        names.append(backend.kind({name: name for name in _BACKENDS}))
        backend.finish()
    visualizer.finish()
    return [{"type": name} for name in names]
