"""The runner: mmengine's, put together from this project's loop, hooks and checkpoints."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine import registry as mmengine_registry
from mmengine.dist import barrier, get_world_size, is_main_process
from mmengine.hooks import Hook, ParamSchedulerHook
from mmengine.runner import FlexibleRunner, LogProcessor
from mmengine.visualization import Visualizer
from torch import nn
from torch.utils.data import DataLoader

from covft.atomic import remove_partial_files, set_aside
from covft.checkpoints.trainable import WEIGHTS_NAME, trainable_shapes
from covft.engine.checkpoint import restore_state
from covft.engine.checkpoint_files import (
    find_checkpoints,
    iteration_of,
    point_to_newest,
    read_resumed,
)
from covft.engine.checkpoint_hook import CheckpointHook
from covft.engine.loop import TrainLoop
from covft.engine.progress_hook import ProgressHook
from covft.engine.sample_hooks import BadSampleHook
from covft.engine.scalars_hook import ScalarsHook
from covft.engine.strategies import STRATEGIES, chosen_strategy
from covft.engine.throughput_hook import ThroughputHook
from covft.registry import HOOKS, LOOPS, Registry

VISUALIZATION_BACKENDS = Registry(
    "visualization backend",
    parent=mmengine_registry.VISBACKENDS,
    locations=["covft.engine.runner"],
)
#: What the backends import when they are first used, by then deep inside a run.
_BACKEND_PACKAGES = {
    "TensorboardVisBackend": "tensorboard",
    "WandbVisBackend": "wandb",
    "MLflowVisBackend": "mlflow",
    "ClearMLVisBackend": "clearml",
    "NeptuneVisBackend": "neptune",
    "DVCLiveVisBackend": "dvclive",
    "AimVisBackend": "aim",
}
DEFAULT_HOOKS = (
    BadSampleHook,
    ThroughputHook,
    ScalarsHook,
    ProgressHook,
    ParamSchedulerHook,
    CheckpointHook,
)
_counter = itertools.count()


class Runner(FlexibleRunner):
    """Trains a model; build it with :meth:`from_parts`.

    Attributes:
        config_text: The config as text; it is kept in checkpoints and compared on resume.
        trained_shapes: Names and shapes of what training changes, whole.
    """

    config_text: str
    trained_shapes: dict[str, tuple[int, ...]]
    model: Any
    # First a config, then what was built from it; mmengine's class does the same.
    _train_loop: Any
    _train_dataloader: Any
    optim_wrapper: Any
    param_schedulers: Any
    strategy: Any

    @classmethod
    def from_parts(
        cls,
        *,
        model: nn.Module,
        dataloader: DataLoader[Any],
        train_cfg: Mapping[str, Any],
        optim_wrapper: Mapping[str, Any],
        work_dir: str | Path,
        param_scheduler: Mapping[str, Any] | None = None,
        hooks: Sequence[Hook | Mapping[str, Any]] = (),
        resume: bool | str | Path = False,
        launcher: str = "none",
        strategy: Mapping[str, Any] | None = None,
        seed: int = 0,
        visualizer: Mapping[str, Any] | None = None,
        config_text: str = "",
    ) -> Runner:
        """Build a runner that is ready to train, resumed if asked to.

        Args:
            model: The model, its weights loaded and frozen where it is to be; ``forward(**batch)``
                returns an object with ``loss_sum`` and ``num_tokens``.
            dataloader: See :func:`covft.engine.build_dataloader`.
            train_cfg: Arguments of :class:`covft.engine.TrainLoop`: ``max_iters`` or
                ``max_epochs``, ``accumulation``, ``max_bad_steps``.
            optim_wrapper: See :func:`covft.engine.build_optim_wrapper`.
            work_dir: Where the run is written.
            param_scheduler: ``dict(type="CosineWarmup", ...)``; None keeps the learning rates.
            hooks: Hooks or their configs, beside the default ones; one of a default's class takes
                its place.
            resume: True continues from the newest readable checkpoint in ``work_dir``, or starts
                if there is none; a path continues from that checkpoint.
            launcher: "none", "pytorch", "slurm" or "mpi".
            strategy: ``dict(type="ddp")``, "fsdp2", "zero2" or "zero3" with its options; by default
                one device or, with a launcher, "ddp".
            seed: Seed of dropout and the like, to which a process adds its rank.
            visualizer: ``dict(vis_backends=[dict(type="TensorboardVisBackend"), ...])``.
            config_text: The config as text.

        Raises:
            ValueError: If a part doesn't fit; the message says what to change.
            FileNotFoundError: If ``resume`` names a checkpoint that doesn't exist.
            ImportError: If a visualization backend's package isn't installed.
        """
        strategy = chosen_strategy(strategy, launcher)
        work_dir = Path(work_dir).absolute()
        work_dir.mkdir(parents=True, exist_ok=True)
        # Two runs of one process, such as two stages, must not share mmengine's global instances.
        name = f"{work_dir.name}-{os.getpid()}-{next(_counter)}"
        randomness = {"seed": seed, "diff_rank_seed": True}
        runner = cls(
            model,
            work_dir=str(work_dir),
            experiment_name=name,
            train_dataloader=dataloader,
            train_cfg=dict(train_cfg),
            optim_wrapper=dict(optim_wrapper),
            param_scheduler=dict(param_scheduler) if param_scheduler else None,
            strategy=strategy,
            custom_hooks=list(hooks),
            resume=str(resume) if isinstance(resume, Path) else resume,
            launcher=launcher,
            env_cfg={},
            log_processor=LogProcessor(),
            visualizer=dict(visualizer) if visualizer else None,
            default_scope="covft",
            randomness=randomness,
        )
        runner.logger.setLevel(logging.NOTSET)
        runner.config_text = config_text
        runner._prepare()
        return runner

    def train(self) -> nn.Module:
        """Run to the end; return the model."""
        try:
            self.call_hook("before_run")
            model = self.train_loop.run()
            self.call_hook("after_run")
        finally:
            self.call_hook("on_exit")
            for handler in self.logger.handlers:
                handler.close()
        return model

    def close(self) -> None:
        """Let go of model, optimizer and data, after which the runner is of no more use.

        Runner, strategy, loop and hooks refer to each other. What a caller doesn't hold itself is
        freed by the next ``gc.collect()``; without this, one that still holds the runner, such as
        a traceback, would hold it all.
        """
        self.model = self.strategy = self.optim_wrapper = self.param_schedulers = None
        self._train_loop = self._train_dataloader = None
        self._hooks.clear()

    def build_strategy(
        self, strategy: dict[str, Any], *, launcher: str, randomness: dict[str, Any], **kwargs: Any
    ) -> Any:
        """Build the strategy, which sets up logging, the process group and the seed."""
        environment = {"launcher": launcher, "randomness": randomness}
        arguments = {
            "work_dir": self._work_dir,
            "experiment_name": kwargs["experiment_name"],
            "env_kwargs": environment,
        }
        built = STRATEGIES.build({**strategy, **arguments})
        # mmengine's constructor, which goes on now, logs environment and hooks on some 80 lines.
        built.logger.setLevel(logging.WARNING)
        return built

    def build_train_loop(self, loop: Mapping[str, Any]) -> TrainLoop:
        """Build the loop."""
        parts = {"runner": self, "dataloader": self._train_dataloader}
        return LOOPS.build({"type": TrainLoop, **loop, **parts})

    def build_visualizer(self, visualizer: Mapping[str, Any] | None) -> Visualizer | None:
        """Build the visualizer, or none if no backend was asked for."""
        if visualizer is None:
            return None
        if set(visualizer) != {"vis_backends"}:
            raise ValueError(
                "visualizer must be dict(vis_backends=[dict(type=...), ...]), got "
                f"{dict(visualizer)}"
            )
        backends = [_build_backend(cfg, self.work_dir) for cfg in visualizer["vis_backends"]]
        return Visualizer(name=self.experiment_name, vis_backends=backends, save_dir=self.work_dir)

    def register_hooks(
        self, default_hooks: None, custom_hooks: Sequence[Hook | Mapping[str, Any]]
    ) -> None:
        """Register the default hooks that ``custom_hooks`` doesn't replace, and those."""
        hooks = [hook if isinstance(hook, Hook) else HOOKS.build(hook) for hook in custom_hooks]
        for kind in DEFAULT_HOOKS:
            if not any(isinstance(hook, kind) for hook in hooks):
                self.register_hook(kind())
        for hook in hooks:
            self.register_hook(hook)

    def dump_config(self) -> None:
        """Write nothing: mmengine would dump a config that this runner isn't built from."""

    def load_or_resume(self) -> None:
        """Continue from a checkpoint if asked to; put older runs' checkpoints out of the way."""
        work_dir = Path(self.work_dir)
        if is_main_process():
            remove_partial_files(work_dir)
        barrier()
        found = self._resume_source(work_dir)
        if found is not None:
            path, state = found
            self.call_hook("after_load_checkpoint", checkpoint=state)
            restore_state(self, state, source=path)
            self.logger.info(f"resuming from {path} after {self.iter} of {self.max_iters} steps")
        if is_main_process():
            self._set_aside_newer_files(work_dir)
        barrier()

    def _prepare(self) -> None:
        sampler: Any = self._train_dataloader.batch_sampler
        if sampler.world_size != get_world_size():
            raise ValueError(
                f"the dataloader was built for {sampler.world_size} processes, but there are "
                f"{get_world_size()}; call setup_distributed(launcher) before building it"
            )
        self._train_loop = self.build_train_loop(self._train_loop)
        # Before the model is wrapped: some engines leave nothing of shapes and sizes.
        self.trained_shapes = trainable_shapes(self.model)
        num_parameters = sum(p.numel() for p in self.model.parameters())
        trained = {n: p.numel() for n, p in self.model.named_parameters() if p.requires_grad}
        self.strategy.prepare(
            self.model,
            optim_wrapper=self.optim_wrapper,
            param_scheduler=self.param_schedulers,
            dispatch_kwargs={"max_iters": self.max_iters},
        )
        self.model = self.strategy.model
        self.optim_wrapper = self.strategy.optim_wrapper
        self.param_schedulers = getattr(self.strategy, "param_schedulers", None)
        self._log_plan(num_parameters, trained)
        self.load_or_resume()

    def _resume_source(self, work_dir: Path) -> tuple[Path, dict[str, Any]] | None:
        if not self._resume:
            return None
        found = read_resumed(work_dir, self._resume, self.logger)
        if found is None:
            self.logger.info(f"nothing to resume from in {work_dir}: starting from the beginning")
        return found

    def _set_aside_newer_files(self, work_dir: Path) -> None:
        """Rename what a later resume, or the next stage, would take for this run's.

        That is an earlier run's in the same folder, or lies after the checkpoint that was named.
        """
        newer = [p for p in find_checkpoints(work_dir) if iteration_of(p) > self.iter]
        weights = work_dir / WEIGHTS_NAME
        if self.iter < self.max_iters and weights.exists():
            newer.append(weights)
        for path, renamed in set_aside(newer):
            self.logger.warning(f"{path.name} was there before this run; renamed to {renamed.name}")
        point_to_newest(work_dir)

    def _log_plan(self, num_parameters: int, trained: Mapping[str, int]) -> None:
        """Say what is trained, and how.

        Args:
            num_parameters: All of the model's.
            trained: Size of every trainable parameter; of a sharded one, the whole.
        """
        self.logger.info(
            f"{self.max_iters} steps on {get_world_size()} x {self.strategy.device}, strategy "
            f"{self.strategy.name}, precision {self.strategy.precision}; "
            f"{sum(trained.values()):,} of {num_parameters:,} parameters are trained"
        )
        for group in self.optim_wrapper.optimizer.param_groups:
            count = sum(trained[name] for name in group["param_names"])
            self.logger.info(
                f"group {group['name']}: {count:,} parameters, peak lr "
                f"{group.get('initial_lr', group['lr']):.3g}, weight decay {group['weight_decay']}"
            )
        for scheduler in self.param_schedulers or ():
            self.logger.info(f"learning rate: {scheduler.describe()}")


def _build_backend(cfg: Mapping[str, Any], work_dir: str) -> Any:
    """Build a visualization backend after checking that its package is there."""
    kind = cfg.get("type")
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
    package = _BACKEND_PACKAGES.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ImportError(
            f"visualizer: {name} needs the package '{package}'; install it with "
            f"`pip install {package}`, or remove the backend from the config"
        )
    return VISUALIZATION_BACKENDS.build({"save_dir": str(Path(work_dir) / "vis_data"), **cfg})
