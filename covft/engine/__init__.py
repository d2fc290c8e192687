"""Training: runner, loop, checkpoints, hooks, optimizer, schedule."""

from covft.checkpoints.trainable import load_weights, save_weights
from covft.engine.bf16_adamw import BF16AdamW
from covft.engine.checkpoint_hook import CheckpointHook
from covft.engine.data import build_dataloader
from covft.engine.loop import TrainLoop
from covft.engine.optim_wrapper import AutocastOptimWrapper
from covft.engine.optimizer import build_optim_wrapper
from covft.engine.progress_hook import ProgressHook
from covft.engine.runner import Runner
from covft.engine.sample_hooks import BadSampleHook, SampleLogHook
from covft.engine.scalars_hook import ScalarsHook
from covft.engine.schedule import CosineWarmup
from covft.engine.strategies import DDPStrategy, SingleDeviceStrategy, setup_distributed
from covft.engine.throughput_hook import ThroughputHook

__all__ = [
    "AutocastOptimWrapper",
    "BF16AdamW",
    "BadSampleHook",
    "CheckpointHook",
    "CosineWarmup",
    "DDPStrategy",
    "ProgressHook",
    "Runner",
    "SampleLogHook",
    "ScalarsHook",
    "SingleDeviceStrategy",
    "ThroughputHook",
    "TrainLoop",
    "build_dataloader",
    "build_optim_wrapper",
    "load_weights",
    "save_weights",
    "setup_distributed",
]
