"""A run's folder without the training."""

from pathlib import Path

from covft.checkpoints import build_model
from covft.checkpoints.trainable import save_weights
from covft.config import load_config, save_config, stage_configs


def untrained_run(folder: Path, tiny_options, **changes) -> Path:
    """Write a finished run of one stage that was never trained; its questions are all 24."""
    options = {**tiny_options, "stages": {"_delete_": True}, "evaluation.benchmark.limit": None}
    cfg = load_config("quickstart_covft", {**options, "evaluation.blind": False, **changes})
    folder.mkdir()
    save_config(cfg, folder / "config.py")
    ((_, stage),) = stage_configs(cfg)
    save_weights(build_model(stage), folder / "weights.safetensors", metadata={})
    return folder
