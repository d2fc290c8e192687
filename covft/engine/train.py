"""From a config to a trained and scored model: every stage, then the evaluation."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import barrier, broadcast_object_list, is_main_process

from covft.atomic import atomic_write_text, set_aside
from covft.checkpoints.run import build_model, load_run, load_start, stage_dir
from covft.checkpoints.trainable import WEIGHTS_NAME, load_weights
from covft.config import CONFIG_NAME, save_config, stage_configs, stage_text
from covft.datasets.base import ConversationDataset
from covft.datasets.collate import Collator
from covft.datasets.spec import InputSpec
from covft.engine.checkpoint_files import together
from covft.engine.checkpoint_hook import CheckpointHook
from covft.engine.compile import compile_blocks
from covft.engine.data import build_dataloader
from covft.engine.flops import cost_model
from covft.engine.preflight import check_run
from covft.engine.preview import AnswerPreview
from covft.engine.progress_hook import ProgressHook
from covft.engine.results import RESULTS_NAME, evaluate_run
from covft.engine.runner import Runner
from covft.engine.sample_hooks import SampleLogHook
from covft.engine.scalars_hook import SCALARS_NAME, read_scalars
from covft.engine.strategies import setup_distributed
from covft.engine.throughput_hook import ThroughputHook
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
        launcher: "none", "pytorch" (torchrun), "slurm" or "mpi".

    Raises:
        ValueError: If the config doesn't fit together; the message says what to change.
    """
    started = time.perf_counter()
    setup_distributed(launcher)
    if cfg.get("num_threads"):
        torch.set_num_threads(cfg.num_threads)
    stages = stage_configs(cfg)
    with together():
        check_run(cfg, work_dir if resume is True else None, launcher=launcher)
    folders = [stage_dir(work_dir, name, num_stages=len(stages)) for name, _ in stages]
    finished = _finished(folders) if resume is True else [False] * len(folders)
    if isinstance(resume, str) and len(stages) > 1:
        raise ValueError(
            "--resume PATH works for a config of one stage; "
            f"this one has {', '.join(name for name, _ in stages)}: use --resume alone"
        )
    if is_main_process():
        work_dir.mkdir(parents=True, exist_ok=True)
        if not resume:
            set_aside([*(folders if len(stages) > 1 else []), work_dir / RESULTS_NAME])
        save_config(cfg, work_dir / CONFIG_NAME)
    barrier()
    earlier_seconds = 0.0
    for index, (_, stage) in enumerate(stages):
        if finished[index]:
            earlier_seconds += _stage_seconds(folders[index])
        else:
            earlier_seconds += _run_stage(
                stage,
                folders[index],
                first_stage=stages[0][1],
                earlier=folders[:index],
                seed=cfg.get("seed", 0),
                resume=resume,
                launcher=launcher,
            )
            _free_memory()
    if cfg.get("evaluation") and is_main_process():
        evaluate_run(
            load_run(work_dir),
            work_dir,
            train_seconds=sum(_stage_seconds(folder) for folder in folders),
            total_started=started - earlier_seconds,
        )


def build_dataset(stage: Config, model: MLLM) -> ConversationDataset:
    """Build a stage's training set for a model."""
    dataset: ConversationDataset = DATASETS.build(
        stage.train_dataset, default_args={"spec": InputSpec.of(model)}
    )
    return dataset


def _run_stage(
    stage: Config,
    folder: Path,
    *,
    first_stage: Config,
    earlier: list[Path],
    seed: int,
    resume: bool | str,
    launcher: str,
) -> float:
    """Train a stage; return how many of its seconds earlier, interrupted calls took."""
    model = build_model(stage, seed=seed)
    started = time.perf_counter()  # after what a first build may have to download
    load_start(model, first_stage)
    with together():  # without a folder that all nodes share, only one has the weights
        for weights in earlier:
            load_weights(model, weights)
    dataset = build_dataset(stage, model)
    train_cfg = dict(stage.train_cfg)
    pack = stage.train_dataloader.get("pack", False)
    dataloader = build_dataloader(
        dataset,
        Collator(dataset.spec, pack=pack),
        accumulation=train_cfg.get("accumulation", 1),
        seed=seed,
        cost=cost_model(model) if pack else None,
        **stage.train_dataloader,
    )
    compile_blocks(model, stage.get("compile"))
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
        strategy=stage.get("strategy"),
        seed=seed,
        visualizer=stage.get("visualizer"),
        config_text=stage_text(stage, seed=seed),
    )
    before = _seconds_before(folder, runner.iter)
    (folder / TIMING_NAME).unlink(missing_ok=True)
    runner.train()
    if is_main_process():
        seconds = before + time.perf_counter() - started
        timing = {"seconds": seconds, "steps": runner.iter, "threads": torch.get_num_threads()}
        atomic_write_text(folder / TIMING_NAME, json.dumps(timing) + "\n")
    barrier()
    runner.close()
    return before


def _finished(folders: list[Path]) -> list[bool]:
    """Return which stages are finished, as the main process sees it."""
    finished = [[(folder / WEIGHTS_NAME).is_file() for folder in folders]]
    broadcast_object_list(finished)
    return finished[0]


def _free_memory() -> None:
    """Free a finished stage's model and optimizer, which are in reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _hooks(stage: Config, dataset: ConversationDataset) -> list[Any]:
    logging: Mapping[str, Any] = stage.get("logging") or {}
    shown = range(min(_NUM_PREVIEWED, len(dataset)))
    preview = SampleLogHook(
        preview=AnswerPreview(dataset, shown), interval=logging.get("preview_interval")
    )
    return [
        ThroughputHook(peak_tflops=logging.get("peak_tflops")),
        ProgressHook(interval=logging.get("interval", 10)),
        CheckpointHook(**(stage.get("checkpoint") or {})),
        preview,
    ]


def _stage_seconds(folder: Path) -> float:
    """Return how long a finished stage took; from its steps if it was killed at the very end."""
    path = folder / TIMING_NAME
    if path.is_file():
        return float(json.loads(path.read_text(encoding="utf-8"))["seconds"])
    return sum(record["seconds"] for record in read_scalars(folder / SCALARS_NAME))


def _seconds_before(folder: Path, steps: int) -> float:
    """Return how long the steps took that an interrupted run has already done."""
    path = folder / SCALARS_NAME
    if not steps or not path.exists():
        return 0.0
    return sum(record["seconds"] for record in read_scalars(path) if record["step"] <= steps)
