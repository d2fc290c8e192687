"""Importing the LLaVA and InternVL configs of xtuner 0.2.

xtuner isn't needed: see :mod:`covft.interop.references`. What would make another model or other
data, and can't be expressed, is an error; all else that isn't carried over is listed. Several
configs, such as LLaVA's pre-training and fine-tuning, become the stages of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from covft.interop.references import run_config
from covft.interop.section import Section, shown
from covft.interop.source import config_source
from covft.interop.xtuner_data import convert_dataloader, convert_datasets, datasets_of, template_of
from covft.interop.xtuner_model import convert_model, image_tokens
from covft.interop.xtuner_training import convert_optimization, convert_runtime

#: What mmengine's runner reads of a config; anything else is a helper variable.
_SECTIONS = (
    "model",
    "train_dataloader",
    "train_cfg",
    "optim_wrapper",
    "param_scheduler",
    "default_hooks",
    "custom_hooks",
    "load_from",
    "resume",
    "randomness",
    "visualizer",
    "work_dir",
    "env_cfg",
    "log_level",
    "log_processor",
    "launcher",
    "default_scope",
    "strategy",
    "runner_type",
    "val_dataloader",
    "val_cfg",
    "val_evaluator",
    "test_dataloader",
    "test_cfg",
    "test_evaluator",
    "auto_scale_lr",
)
_WIDTH = 100
_INHERENT = "the loss is the mean over all supervised tokens of a step; xtuner's of micro-batches"


@dataclass(frozen=True)
class ImportedConfig:
    """A converted config.

    Attributes:
        config: Ours: plain values and classes.
        notes: What isn't carried over, or differs, one line each.
        source: The same as a config file.
    """

    config: dict[str, Any]
    notes: tuple[str, ...]
    source: str


def import_xtuner(*paths: str | Path, template: str | None = None) -> ImportedConfig:
    """Convert xtuner configs; several become stages, in their order.

    Args:
        paths: The files.
        template: The conversation template to use instead of the counterpart of xtuner's.

    Raises:
        FileNotFoundError: If a file doesn't exist.
        ValueError: If a file isn't an xtuner config of a multimodal LLM, or can't be expressed.
    """
    if not paths:
        raise ValueError("no config was given")
    files = [Path(path) for path in paths]
    names = [file.stem for file in files]
    if len(set(names)) < len(names):
        raise ValueError(f"stages are named after their files, but two are alike: {names}")
    notes: list[str] = []
    stages = []
    for file in files:
        found: list[str] = []
        stages.append(_convert(file, template, found))
        prefix = f"{file.stem}: " if len(files) > 1 else ""
        notes += [prefix + note for note in found]
    config = stages[-1] if len(stages) == 1 else _joined(names, stages, notes)
    notes.append(_INHERENT)
    description = f"Converted from {' and '.join(file.name for file in files)} of xtuner.\n\n"
    listed = (fill(note, _WIDTH, initial_indent="* ", subsequent_indent="  ") for note in notes)
    description += "Not carried over, or different:\n\n" + "\n".join(listed)
    return ImportedConfig(config, tuple(notes), config_source(config, description=description))


def _convert(file: Path, template: str | None, notes: list[str]) -> dict[str, Any]:
    values = run_config(file)
    if not isinstance(values.get("model"), Mapping):
        raise ValueError(f"{file} has no 'model': it is no config of an xtuner training")
    _note_unused(values, notes)
    config = Section({k: v for k, v in values.items() if k in _SECTIONS}, "", notes)
    loader = config.section("train_dataloader") or Section({}, "train_dataloader", notes)
    datasets = datasets_of(loader)
    prompt = template_of(datasets, template, notes)
    model_section = config.section("model")
    assert model_section is not None
    model, load_from = convert_model(model_section, prompt)
    converted: dict[str, Any] = {
        "model": model,
        "train_dataset": convert_datasets(datasets, image_tokens(model)),
        "train_dataloader": convert_dataloader(loader),
        **convert_optimization(config),
        **convert_runtime(config),
    }
    load_from = config.take("load_from", None) or load_from
    if load_from:
        converted["load_from"] = load_from
    config.finish()
    return converted


def _note_unused(values: Mapping[str, Any], notes: list[str]) -> None:
    """Note the dicts that nothing uses: a misspelt section is one."""
    used = {id(part) for key in _SECTIONS if key in values for part in _parts(values[key])}
    for key, value in values.items():
        if key not in _SECTIONS and isinstance(value, Mapping) and id(value) not in used:
            notes.append(f"{key} = {shown(value)}: not a section of a config, and used by none")


def _parts(value: Any) -> list[Any]:
    parts = [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        parts += [part for item in value for part in _parts(item)]
    return parts


def _joined(
    names: Sequence[str], stages: Sequence[dict[str, Any]], notes: list[str]
) -> dict[str, Any]:
    """Make one config of several: the last one, and the others as stages before it."""
    shared = ("seed", "work_dir")
    for name, stage in list(zip(names, stages, strict=True))[1:]:
        if "load_from" in stage:
            notes.append(f"{name}: starts from the stage before, not from {stage.pop('load_from')}")
    config = dict(stages[-1])
    overrides: dict[str, Any] = {}
    for name, stage in zip(names[:-1], stages[:-1], strict=True):
        overrides[name] = {
            key: {"_delete_": True, **value} if isinstance(value, Mapping) else value
            for key, value in stage.items()
            if key not in shared
        }
    return {**config, "stages": {**overrides, names[-1]: {}}}
