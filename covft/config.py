"""Loading configs: by path or name, with command-line options, split into their stages.

A config is an mmengine "new style" Python file. What mmengine 0.10.7 gets wrong about those is
repaired here, in :func:`_repair_mmengine`. A config may hold ``stages``, a dict of named overrides
that are run one after the other, each starting from the weights of the one before::

    stages = dict(pretrain=dict(train_cfg=dict(max_iters=100)), finetune=dict())
"""

from __future__ import annotations

import copy
import difflib
import functools
import importlib.metadata
import importlib.util
import pprint
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import mmengine.config.config as mmengine_config
import mmengine.config.utils as mmengine_config_utils
from mmengine.config import Config

from covft.registry import nearest

#: Where a run keeps its config.
CONFIG_NAME = "config.py"
CONFIG_ROOT = Path(__file__).resolve().parent.parent / "configs"

#: What a stage reads. Anything else in a config would be ignored, so it is an error.
STAGE_KEYS = {
    "model": "the MLLM: vision, projector, llm, text_encoder, template",
    "train_dataset": "the training samples",
    "train_dataloader": "micro-batch size, workers, grouping",
    "train_cfg": "run length and accumulation",
    "optim_wrapper": "optimizer, learning rates, precision, clipping",
    "param_scheduler": "the learning-rate curve",
    "strategy": "the engine that shares the work among processes: ddp, fsdp2, zero2, zero3",
    "compile": "torch.compile of the encoder's and the LLM's blocks: True, or dict(mode=..., ...)",
    "checkpoint": "how often checkpoints are written and how many are kept",
    "logging": "how often a line, and a sample with generations, is logged",
    "visualizer": "TensorBoard, wandb and other mmengine backends",
    "load_from": "a run folder, weights file or public checkpoint to start from",
}
TOP_LEVEL_KEYS = {
    **STAGE_KEYS,
    "stages": "named overrides, run in order",
    "evaluation": "benchmarks scored after training",
    "seed": "the seed of everything random",
    "num_threads": "CPU threads of torch",
    "work_dir": "where the run is written",
}
#: Names that parts under configs/_base_ define for recipes to compose; alone they mean nothing.
PART_NAMES = {"vision_backbone", "llm", "text_encoder"}


def load_config(path_or_name: str | Path, options: Mapping[str, Any] | None = None) -> Config:
    """Load a config and apply options to it.

    Args:
        path_or_name: A file, or the name of one under configs/ (with or without ``.py``).
        options: Dotted keys and their values, as from ``--cfg-options``.

    Returns:
        The config, its part names removed and its keys checked.

    Raises:
        FileNotFoundError: If there is no such config; the nearest names are given.
        ValueError: If a key is unknown, or an option would have no effect.
    """
    cfg = _from_file(find_config(path_or_name))
    _check_keys(cfg, TOP_LEVEL_KEYS, where=str(path_or_name))
    stages = list(cfg.get("stages") or {})
    if options:
        _check_options(cfg, options)
        cfg.merge_from_dict(copy.deepcopy(dict(options)))
    for name, stage in (cfg.get("stages") or {}).items():
        if name not in stages:
            raise ValueError(f"--cfg-options stages.{name}: no such stage; {nearest(name, stages)}")
        _check_keys(stage, STAGE_KEYS, where=f"stages.{name}")
    return cfg


def find_config(path_or_name: str | Path) -> Path:
    """Return the config file of that path or name.

    Raises:
        FileNotFoundError: If there is none.
    """
    direct = Path(path_or_name)
    if direct.is_file():
        return direct
    named = CONFIG_ROOT / f"{direct.name.removesuffix('.py')}.py"
    if len(direct.parts) == 1 and named.is_file():
        return named
    known = [path.stem for path in CONFIG_ROOT.glob("*.py")]
    raise FileNotFoundError(f"no config '{path_or_name}'; {nearest(direct.stem, known)}")


def is_under(name: str, parent: str) -> bool:
    """Tell whether a dotted name, of a config's key or a parameter, is ``parent`` or part of it."""
    return name == parent or name.startswith(f"{parent}.")


def stage_configs(cfg: Config) -> list[tuple[str, Config]]:
    """Return the stages of a config in their order, each a config of its own.

    A config without ``stages`` is a single stage called "train". What ``load_from`` names is the
    first stage's start; the later ones start from the stage before.

    Raises:
        ValueError: If a later stage sets ``load_from``.
    """
    base = {key: value for key, value in cfg._to_lazy_dict().items() if key in STAGE_KEYS}
    stages = cfg._to_lazy_dict().get("stages") or {"train": {}}
    merged: list[tuple[str, Config]] = []
    for name, overrides in stages.items():
        if merged:
            if "load_from" in overrides:
                raise ValueError(
                    f"stages.{name}.load_from: only the first stage can start from other weights"
                )
            base.pop("load_from", None)
        stage = Config._merge_a_into_b(copy.deepcopy(overrides), copy.deepcopy(base))
        merged.append((name, Config(stage)))
    return merged


def save_config(cfg: Config, path: Path) -> None:
    """Write a config so that :func:`load_config` reads the same back; an atomic replacement."""
    temporary = path.with_name(f".{path.stem}.tmp.py")
    temporary.write_text(config_text(cfg), encoding="utf-8")
    try:
        load_config(temporary)
    except (SyntaxError, NameError, TypeError) as error:
        raise ValueError(
            "the config holds a value that can't be written down and read again (a Path, a "
            f"function, an infinite number); use plain values: {error}"
        ) from error
    temporary.replace(path)


def config_text(cfg: Config) -> str:
    """Return a config as Python source, its keys in their order: that of ``stages`` counts."""
    # mmengine's own pretty_text sorts the keys.
    return "".join(
        f"{key} = {pprint.pformat(value, sort_dicts=False, width=100)}\n"
        for key, value in cfg.to_dict().items()
    )


def stage_text(cfg: Config, *, seed: int) -> str:
    """Return what a stage's outcome depends on: its config, in part, and the seed, as source.

    Args:
        cfg: The stage, see :func:`stage_configs`.
        seed: The run's.
    """
    unimportant = ("logging", "checkpoint", "visualizer", "strategy", "compile")
    kept = {key: value for key, value in cfg.to_dict().items() if key not in unimportant}
    return config_text(Config({**kept, "seed": seed}))


def changed_lines(before: str, now: str, *, limit: int = 20) -> list[str]:
    """Return the lines in which two configs' texts differ, marked ``-`` and ``+``.

    Args:
        before: The older text.
        now: The newer text.
        limit: How many lines are shown; a last line counts the others.
    """
    diff = difflib.unified_diff(before.splitlines(), now.splitlines(), n=0, lineterm="")
    changes = [line for line in diff if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    rest = len(changes) - limit
    return changes[:limit] + ([f"... {rest} more lines"] if rest > 0 else [])


def _from_file(path: Path) -> Config:
    _repair_mmengine()
    cfg = Config.fromfile(path)
    for key, value in list(cfg._cfg_dict.items()):
        is_import = key in cfg._imported_names or isinstance(value, ModuleType)
        if is_import or key in PART_NAMES or key.startswith("_"):
            cfg._cfg_dict.pop(key)
    return cfg


def _check_keys(found: Mapping[str, Any], known: Mapping[str, str], *, where: str) -> None:
    for key in found:
        if key not in known:
            raise ValueError(
                f"{where}: unknown config key '{key}'; {nearest(key, known)}. "
                "Start the name of a helper variable with an underscore."
            )


def _check_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Refuse options with an unknown key, or that every stage overrides."""
    stages = cfg.get("stages") or {}
    for key in options:
        first = key.split(".")[0]
        if first in PART_NAMES:
            place = {"vision_backbone": "model.vision.backbone"}.get(first, f"model.{first}")
            raise ValueError(f"--cfg-options {key}: '{first}' is a part; set {place}.… instead")
        _check_keys({first: None}, TOP_LEVEL_KEYS, where="--cfg-options")
        if stages and all(_is_set(stage, key) for stage in stages.values()):
            instead = ", ".join(f"stages.{name}.{key}" for name in stages)
            raise ValueError(
                f"--cfg-options {key} would have no effect: every stage sets it. Use {instead}."
            )


def _is_set(cfg: Any, dotted: str) -> bool:
    """Tell whether ``cfg`` holds the key, or replaces one of its parents by another value."""
    for key in dotted.split("."):
        if not isinstance(cfg, Mapping) or cfg.get("_delete_"):
            return True
        if key not in cfg:
            return False
        cfg = cfg[key]
    return True


@functools.cache
def _repair_mmengine() -> None:
    """Repair two helpers of mmengine 0.10.7's lazy configs.

    In a virtual environment it takes standard-library modules for third-party ones and makes
    ``LazyObject`` of them; and it looks packages up through ``pkg_resources``, which current
    setuptools no longer ships.
    """

    def is_builtin_module(name: str) -> bool:
        if name.startswith("."):
            return False
        return name.startswith("mmengine.config") or name.split(".")[0] in sys.stdlib_module_names

    def is_installed(package: str) -> bool:
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            return importlib.util.find_spec(package) is not None
        return True

    def installed_path(package: str) -> str:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"a config imports from '{package}', which isn't installed")
        return next(iter(spec.submodule_search_locations))

    mmengine_config_utils._is_builtin_module = is_builtin_module
    mmengine_config._is_builtin_module = is_builtin_module
    mmengine_config.is_installed = is_installed
    mmengine_config.get_installed_path = installed_path
