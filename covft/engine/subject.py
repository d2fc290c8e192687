"""What is evaluated: a finished run, or a config with a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmengine.config import Config

from covft.checkpoints.run import Run, best_device, build_model, load_run, load_start, run_weights
from covft.checkpoints.trainable import WEIGHTS_NAME
from covft.config import CONFIG_NAME, config_text, find_config, load_config, stage_configs
from covft.conversation import get_template
from covft.datasets.spec import InputSpec
from covft.datasets.tiling import Resizing, checked_resizing
from covft.weights.files import public_file


@dataclass(frozen=True)
class Subject:
    """What is evaluated; its model is built only when it is asked for.

    Attributes:
        name: Shown in tables.
        config: The whole config.
        weights: Files whose contents, with the config, make the model.
        load: Builds the model.
    """

    name: str
    config: Config
    weights: tuple[Path, ...]
    load: Callable[[], Run]

    @cached_property
    def run(self) -> Run:
        """The model, built when it is first asked for."""
        return self.load()

    @property
    def model_text(self) -> str:
        """The model's config as text: two that differ give other answers."""
        last = stage_configs(self.config)[-1][1].to_dict()
        start = self.config.to_dict().get("load_from")
        return config_text(Config({"model": last["model"], "load_from": start}))

    @property
    def resize(self) -> Resizing:
        """How images become squares."""
        return _resizing(stage_configs(self.config)[-1][1])

    @property
    def template(self) -> str | None:
        """The conversation template as text; None where only the built model knows it."""
        model = stage_configs(self.config)[-1][1].to_dict()["model"]
        named = model.get("template") or (model.get("llm") or {}).get("template")
        return repr(get_template(named)) if named else None


def finished_run(path: str | Path, *, device: str | None = None) -> Subject:
    """Return a finished run, without building its model.

    Raises:
        FileNotFoundError: If the folder holds no run, or a stage isn't finished.
    """
    root = Path(path).resolve()
    if not (root / CONFIG_NAME).is_file():
        raise FileNotFoundError(
            f"'{root}' is no run: {CONFIG_NAME} is missing; give the --work-dir of a training, or "
            "a config and a checkpoint"
        )
    config = load_config(root / CONFIG_NAME)
    files = tuple(run_weights(root, config))
    return Subject(root.name, config, files, lambda: load_run(root, device=device))


def config_and_checkpoint(
    config: str | Path,
    checkpoint: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    device: str | None = None,
) -> Subject:
    """Return the model of a config's last stage with the weights of a checkpoint.

    Args:
        config: A config file, or the name of one.
        checkpoint: A run's folder, a weights file, or a public checkpoint.
        options: Changes of the config.
        device: Where the model is put; default: a GPU if there is one.

    Raises:
        FileNotFoundError: If there is no such config or checkpoint.
        ValueError: If an option is unknown.
    """
    cfg = load_config(config, options)
    files = tuple(checkpoint_files(Path(checkpoint).expanduser()))

    def load() -> Run:
        stages = stage_configs(cfg)
        model = build_model(stages[-1][1], seed=cfg.get("seed", 0))
        load_start(model, stages[0][1])
        load_start(model, Config({"load_from": str(Path(checkpoint).expanduser())}))
        model = model.to(device or best_device()).eval()
        return Run(model, InputSpec.of(model), cfg, files, _resizing(stages[-1][1]))

    name = f"{find_config(config).stem}-{Path(checkpoint).resolve().name}"
    return Subject(name, cfg, files, load)


def checkpoint_files(path: Path) -> list[Path]:
    """Return the files that hold a checkpoint's weights.

    Args:
        path: A run's folder, a weights file, or a folder with a public checkpoint.

    Raises:
        FileNotFoundError: If there are none.
    """
    if (path / CONFIG_NAME).is_file():
        return run_weights(path, load_config(path / CONFIG_NAME))
    if path.is_file():
        return [path]
    found = WEIGHTS_NAME if (path / WEIGHTS_NAME).is_file() else None
    name = found or (public_file(path) if path.is_dir() else None)
    if name is None:
        raise FileNotFoundError(
            f"no weights at '{path}'; give a run's folder, a weights file or a public checkpoint"
        )
    if not name.endswith(".json"):
        return [path / name]
    weight_map = json.loads((path / name).read_text(encoding="utf-8"))["weight_map"]
    return [path / name, *(path / shard for shard in sorted(set(weight_map.values())))]


def _resizing(stage: Config) -> Resizing:
    data = stage.get("train_dataset") or {}
    return checked_resizing(data.get("resize"), data.get("max_tiles"))
