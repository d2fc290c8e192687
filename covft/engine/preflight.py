"""What can be found wrong with a config before its first stage is trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from covft.checkpoints.run import stage_dir
from covft.checkpoints.trainable import WEIGHTS_NAME, trained_config
from covft.config import STAGE_KEYS, changed_lines, stage_configs, stage_text
from covft.datasets.mixture import check_dataset
from covft.engine.checkpoint_hook import CheckpointHook, check_sharded
from covft.engine.compile import checked_compile
from covft.engine.data import build_dataloader, check_dataloader
from covft.engine.loop import TrainLoop
from covft.engine.optimizer import build_optim_wrapper
from covft.engine.results import check_evaluation
from covft.engine.schedule import PARAM_SCHEDULERS
from covft.engine.strategies import chosen_strategy, strategy_class
from covft.engine.throughput_hook import ThroughputHook
from covft.models.abstract import UnknownArchitectureError, abstract_model
from covft.models.mllm import MLLM
from covft.models.text_encoder import LLMEmbeddings
from covft.registry import (
    LLMS,
    TEXT_ENCODERS,
    VFT,
    VISION_BACKBONES,
    check_arguments,
    check_config,
)


def check_run(cfg: Config, work_dir: Path | None = None, *, launcher: str | None = None) -> None:
    """Find what is wrong with a config before a stage is trained, rather than after hours of it.

    Every stage's model and optimizer are built without weights, in seconds for any size. Where
    only files know a part's architecture, that is left to the stage's start, and of the VFT method
    just the options are checked.

    Args:
        cfg: The config.
        work_dir: A run's folder that is to be continued; its finished stages must be this config's.
        launcher: What starts the processes; None if that isn't known yet.

    Raises:
        ValueError: If the config doesn't fit together; the message says what to change.
        ImportError: If a package is missing that an option needs.
    """
    stages = stage_configs(cfg)
    for _, stage in stages:
        _check_complete(stage)
        _check_strategy(stage, launcher)
    if cfg.get("evaluation"):
        check_evaluation(cfg.evaluation)
    for name, stage in stages:
        folder = None if work_dir is None else stage_dir(work_dir, name, num_stages=len(stages))
        if folder is not None and (folder / WEIGHTS_NAME).is_file():
            _check_same_config(folder, stage, seed=cfg.get("seed", 0))
    for _, stage in stages:
        _check_builds(stage)


def _check_complete(stage: Config) -> None:
    required = ("model", "train_dataset", "train_dataloader", "train_cfg", "optim_wrapper")
    for key in required:
        if not stage.get(key):
            raise ValueError(f"the config has no '{key}': {STAGE_KEYS[key]}")
    check_arguments(
        build_dataloader,
        {"dataset": None, "collate_fn": None, **stage.train_dataloader},
        where="train_dataloader",
    )
    check_dataloader(**stage.train_dataloader)
    checked_compile(stage.get("compile"))
    check_arguments(CheckpointHook, stage.get("checkpoint") or {}, where="checkpoint")
    check_arguments(
        TrainLoop, {"runner": None, "dataloader": None, **stage.train_cfg}, where="train_cfg"
    )
    check_dataset(stage.train_dataset)
    if stage.get("param_scheduler"):
        check_config(stage.param_scheduler, PARAM_SCHEDULERS, {"optimizer": None, "max_iters": 1})
    known = ("interval", "preview_interval", "peak_tflops")
    for key in stage.get("logging") or {}:
        if key not in known:
            raise ValueError(f"logging.{key} is unknown; known: {', '.join(known)}")
    ThroughputHook(peak_tflops=(stage.get("logging") or {}).get("peak_tflops"))


def _check_strategy(stage: Config, launcher: str | None) -> None:
    strategy = stage.get("strategy")
    if launcher is not None:
        strategy = chosen_strategy(strategy, launcher)
    if not strategy:
        return
    kind = strategy_class(strategy)
    kind.check({key: value for key, value in strategy.items() if key != "type"}, stage)
    check_sharded((stage.get("checkpoint") or {}).get("sharded"), kind)


def _check_builds(stage: Config) -> None:
    """Build a stage's model and optimizer on the meta device."""
    _check_parts(stage.model)
    try:
        model = abstract_model(stage.model)
        build_optim_wrapper(model, _with_used_rates(stage.optim_wrapper, model))
        return
    except UnknownArchitectureError:
        pass  # the stage's start will tell
    except RuntimeError as error:
        # torch's word for what the meta device can't do, such as reading a value: no fault of the
        # config's. Any other is met again with real weights.
        warnings.warn(f"the model couldn't be checked before training: {error}", stacklevel=2)
    VFT.build(stage.model.vision.get("vft") or {"type": "Freeze"})


def _check_parts(model: Mapping[str, Any]) -> None:
    """Check the arguments of the parts whose architecture may be known to files alone."""
    vision = model.get("vision")
    parts = [
        ("vision.backbone", vision.get("backbone") if isinstance(vision, Mapping) else None),
        ("llm", model.get("llm")),
        ("text_encoder", model.get("text_encoder")),
    ]
    for (key, part), registry in zip(parts, (VISION_BACKBONES, LLMS, TEXT_ENCODERS), strict=True):
        if part is None and key == "text_encoder":
            continue
        if not isinstance(part, Mapping):
            raise ValueError(f"model.{key} must be dict(type=..., ...), got {part!r}")
        kind = part.get("type")
        kind = registry.get(kind) if isinstance(kind, str) else kind
        reads_llm = isinstance(kind, type) and issubclass(kind, LLMEmbeddings)
        check_config(part, registry, {"llm": None} if reads_llm else None)


def _with_used_rates(cfg: Mapping[str, Any], model: MLLM) -> dict[str, Any]:
    """Return an ``optim_wrapper`` without the rates of frozen parts: the stage warns of those."""
    frozen = [
        name
        for name, part in model.named_children()
        if not any(parameter.requires_grad for parameter in part.parameters())
    ]
    rates = cfg.get("lr") or {}
    return {**cfg, "lr": {prefix: rate for prefix, rate in rates.items() if prefix not in frozen}}


def _check_same_config(folder: Path, stage: Config, *, seed: int) -> None:
    """Refuse to keep a finished stage of another config: config.py would tell of what never ran."""
    trained = trained_config(folder / WEIGHTS_NAME)
    now = stage_text(stage, seed=seed)
    if trained != now:
        raise ValueError(
            f"{folder} is finished, but was trained with another config:\n"
            + "\n".join(changed_lines(trained, now))
            + "\nResume with the config and --cfg-options of then, or choose another --work-dir."
        )
