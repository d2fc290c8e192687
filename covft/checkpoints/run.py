"""A finished run's folder: its config, its stages' weights, and the model they make."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner import set_random_seed

from covft.checkpoints.importing import import_checkpoint, is_public
from covft.checkpoints.sharded import is_sharded
from covft.checkpoints.trainable import WEIGHTS_NAME, load_weights
from covft.config import CONFIG_NAME, load_config, stage_configs
from covft.datasets.spec import InputSpec
from covft.datasets.tiling import Resizing, checked_resizing
from covft.models.mllm import MLLM
from covft.registry import MODELS
from covft.weights.files import open_tensors


@dataclass(frozen=True)
class Run:
    """A model and what it was made from.

    Attributes:
        model: The model, in eval mode.
        spec: What it expects of its data.
        config: The run's config.
        weights: The files that were loaded, in order.
        resize: How training made images square, tiles included; None is the encoder's own way.
    """

    model: MLLM
    spec: InputSpec
    config: Config
    weights: tuple[Path, ...]
    resize: Resizing


def build_model(stage: Config, *, seed: int = 0) -> MLLM:
    """Build a stage's model from its pretrained parts.

    Args:
        stage: A config of :func:`covft.config.stage_configs`.
        seed: Seed of what has no pretrained weights, so that a rebuilt model is the same.
    """
    set_random_seed(seed)
    model: MLLM = MODELS.build(stage.model)
    return model


def stage_dir(work_dir: Path, name: str, *, num_stages: int) -> Path:
    """Return where a stage is written: the run's folder itself if it's the only stage."""
    return work_dir if num_stages == 1 else work_dir / name


def run_weights(root: Path, config: Config) -> list[Path]:
    """Return the weights files of a run's stages, in order, whether they exist or not."""
    names = [name for name, _ in stage_configs(config)]
    return [stage_dir(root, name, num_stages=len(names)) / WEIGHTS_NAME for name in names]


def load_start(model: MLLM, stage: Config) -> None:
    """Load what ``load_from`` names, if it is set.

    That is a weights file, a stage's folder, a whole run, or a public checkpoint
    (:func:`~covft.checkpoints.importing.import_checkpoint`).

    Raises:
        FileNotFoundError: If there are no weights, or a run isn't finished.
        ValueError: If they don't fit the model, or are in no known format.
    """
    if not stage.get("load_from"):
        return
    path = Path(stage.load_from)
    if (path / CONFIG_NAME).is_file():
        for file in run_weights(path, load_config(path / CONFIG_NAME)):
            load_weights(model, file.parent)  # of a folder, it says that the run isn't finished
    elif is_public(path):
        imported = import_checkpoint(model, path)
        random = [n for n in imported.kept if model.weights_sources().get(n) == "random"]
        if random:
            warnings.warn(
                f"{path} (layout '{imported.layout}') holds no {' and no '.join(random)}, which "
                "the config leaves random; set weights there",
                stacklevel=2,
            )
    else:
        of_a_run = (path / WEIGHTS_NAME).is_file() or any(path.glob("iter_*"))
        if path.is_dir() and not of_a_run and not is_sharded(path):
            open_tensors(path)  # says what a folder of weights has to hold
        load_weights(model, path)


def best_device() -> str:
    """Return "cuda" where there is a GPU, else "cpu"."""
    # Not mmengine's get_device: it also names Apple's GPUs, on which float64 sums don't exist.
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_run(path: str | Path, *, device: str | None = None) -> Run:
    """Load the model of a finished run.

    Args:
        path: The run's folder, as given to ``tools/train.py --work-dir``.
        device: Where to put the model; default: a GPU if there is one.

    Raises:
        FileNotFoundError: If the folder holds no run, or a stage isn't finished.
        ValueError: If weights and config don't fit, or the device can't be used.
    """
    device = best_device() if device is None else _checked_device(device)
    root = Path(path).resolve()
    config_file = root / CONFIG_NAME
    if not config_file.is_file():
        raise FileNotFoundError(
            f"'{root}' is no run: {CONFIG_NAME} is missing; give the --work-dir of a training"
        )
    config = load_config(config_file)
    stages = stage_configs(config)
    files = run_weights(root, config)
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing: the run isn't finished; continue it with "
                f"`tools/train.py {config_file} --work-dir {root} --resume`"
            )
    model = build_model(stages[-1][1], seed=config.get("seed", 0))
    load_start(model, stages[0][1])
    # What a stage froze was left out of its file, and is in that of an earlier one.
    for file in files:
        load_weights(model, file)
    data = stages[-1][1].train_dataset
    resize = checked_resizing(data.get("resize"), data.get("max_tiles"))
    return Run(model.to(device).eval(), InputSpec.of(model), config, tuple(files), resize)


def _checked_device(name: str) -> str:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} can't be used: {reason}") from error
    return name
