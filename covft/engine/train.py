"""From a config to a trained and scored model: every stage, then the evaluation."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import barrier, is_main_process

from covft.checkpoints.atomic import atomic_write_text
from covft.checkpoints.run import build_model, load_run, stage_dir
from covft.checkpoints.trainable import WEIGHTS_NAME, load_weights
from covft.config import CONFIG_NAME, STAGE_KEYS, config_text, save_config, stage_configs
from covft.datasets.collate import Collator
from covft.datasets.instruct import InstructDataset
from covft.datasets.spec import InputSpec
from covft.engine.checkpoint_hook import CheckpointHook
from covft.engine.data import build_dataloader
from covft.engine.preview import AnswerPreview
from covft.engine.progress_hook import ProgressHook
from covft.engine.results import evaluate_run
from covft.engine.runner import Runner
from covft.engine.sample_hooks import SampleLogHook
from covft.engine.scalars_hook import SCALARS_NAME, read_scalars
from covft.engine.strategy import setup_distributed
from covft.models.mllm import MLLM
from covft.registry import DATASETS

#: Written beside a stage's weights: how long it took.
TIMING_NAME = "timing.json"
_NUM_PREVIEWED = 3


def train(
    cfg: Config, *, work_dir: Path, resume: bool | str = False, launcher: str = "none"
) -> None:
    """Run a config's stages in order, then its evaluation.

    Args:
        cfg: A config of :func:`covft.config.load_config`.
        work_dir: Where the run is written: the config, a folder per stage, ``results.json``.
        resume: True continues an interrupted run: finished stages are kept, the unfinished one goes
            on from its newest checkpoint. A path continues from that checkpoint (one stage only).
        launcher: "none", "pytorch" or "slurm".

    Raises:
        ValueError: If the config doesn't fit together; the message says what to change.
    """
    started = time.perf_counter()
    setup_distributed(launcher)
    if cfg.get("num_threads"):
        torch.set_num_threads(cfg.num_threads)
    stages = stage_configs(cfg)
    folders = [stage_dir(work_dir, name, num_stages=len(stages)) for name, _ in stages]
    if isinstance(resume, str) and len(stages) > 1:
        raise ValueError(
            "--resume PATH works for a config of one stage; "
            f"this one has {', '.join(name for name, _ in stages)}: use --resume alone"
        )
    if is_main_process():
        work_dir.mkdir(parents=True, exist_ok=True)
        if not resume and len(stages) > 1:
            _set_aside(folders)
        save_config(cfg, work_dir / CONFIG_NAME)
    barrier()
    for index, (_, stage) in enumerate(stages):
        finished = resume is True and (folders[index] / WEIGHTS_NAME).is_file()
        if not finished:
            _run_stage(
                stage,
                folders[index],
                earlier=folders[:index],
                seed=cfg.get("seed", 0),
                resume=resume,
                launcher=launcher,
            )
    if cfg.get("evaluation") and is_main_process():
        seconds = [json.loads((folder / TIMING_NAME).read_text())["seconds"] for folder in folders]
        evaluate_run(
            load_run(work_dir), work_dir, train_seconds=sum(seconds), total_started=started
        )


def build_dataset(stage: Config, model: MLLM) -> InstructDataset:
    """Build a stage's training set for a model."""
    dataset: InstructDataset = DATASETS.build(
        stage.train_dataset, default_args={"spec": InputSpec.of(model)}
    )
    return dataset


def _run_stage(
    stage: Config,
    folder: Path,
    *,
    earlier: list[Path],
    seed: int,
    resume: bool | str,
    launcher: str,
) -> None:
    started = time.perf_counter()
    _check_complete(stage)
    model = build_model(stage, seed=seed)
    if stage.get("load_from"):
        load_weights(model, stage.load_from)
    for weights in earlier:
        load_weights(model, weights)
    dataset = build_dataset(stage, model)
    train_cfg = dict(stage.train_cfg)
    dataloader = build_dataloader(
        dataset,
        Collator(dataset.spec),
        accumulation=train_cfg.get("accumulation", 1),
        seed=seed,
        **stage.train_dataloader,
    )
    runner = Runner.from_parts(
        model=model,
        dataloader=dataloader,
        train_cfg=train_cfg,
        optim_wrapper=stage.optim_wrapper,
        param_scheduler=stage.get("param_scheduler"),
        hooks=_hooks(stage, dataset),
        work_dir=folder,
        resume=resume,
        launcher=launcher,
        seed=seed,
        visualizer=stage.get("visualizer"),
        config_text=config_text(stage),
    )
    before = _seconds_before(folder, runner.iter)
    runner.train()
    if is_main_process():
        seconds = before + time.perf_counter() - started
        timing = {"seconds": seconds, "steps": runner.iter, "threads": torch.get_num_threads()}
        atomic_write_text(folder / TIMING_NAME, json.dumps(timing) + "\n")
    barrier()


def _hooks(stage: Config, dataset: InstructDataset) -> list[Any]:
    logging: Mapping[str, Any] = stage.get("logging") or {}
    shown = range(min(_NUM_PREVIEWED, len(dataset)))
    preview = SampleLogHook(
        preview=AnswerPreview(dataset, shown), interval=logging.get("preview_interval")
    )
    return [
        ProgressHook(interval=logging.get("interval", 10)),
        CheckpointHook(**(stage.get("checkpoint") or {})),
        preview,
    ]


def _check_complete(stage: Config) -> None:
    required = ("model", "train_dataset", "train_dataloader", "train_cfg", "optim_wrapper")
    for key in required:
        if not stage.get(key):
            raise ValueError(f"the config has no '{key}': {STAGE_KEYS[key]}")
    known = ("interval", "preview_interval")
    for key in stage.get("logging") or {}:
        if key not in known:
            raise ValueError(f"logging.{key} is unknown; known: {', '.join(known)}")


def _seconds_before(folder: Path, steps: int) -> float:
    """Return how long the steps took that an interrupted run has already done."""
    path = folder / SCALARS_NAME
    if not steps or not path.exists():
        return 0.0
    return sum(record["seconds"] for record in read_scalars(path) if record["step"] <= steps)


def _set_aside(folders: list[Path]) -> None:
    """Rename an earlier run's stages, so that nothing of them is taken for this run's."""
    number = 1
    while any(folder.with_name(f"{folder.name}.old{number}").exists() for folder in folders):
        number += 1
    for folder in folders:
        if folder.exists():
            folder.replace(folder.with_name(f"{folder.name}.old{number}"))
