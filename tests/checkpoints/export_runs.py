"""Finished runs for the export tests, written without training: every parameter is noise."""

from pathlib import Path

import torch

from covft.checkpoints import build_model
from covft.checkpoints.run import run_weights
from covft.checkpoints.trainable import save_weights
from covft.config import CONFIG_NAME, load_config, save_config, stage_configs


def write_run(root: Path, options: dict, *, config: str = "quickstart_covft") -> Path:
    """Write a run of the config with the options; what it trains is the initial plus noise."""
    cfg = load_config(config, options)
    root.mkdir()
    save_config(cfg, root / CONFIG_NAME)
    generator = torch.Generator().manual_seed(1)
    for (_, stage), file in zip(stage_configs(cfg), run_weights(root, cfg), strict=True):
        model = build_model(stage)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        file.parent.mkdir(exist_ok=True)
        save_weights(model, file, metadata={})
    return root


def llava_options(options: dict, *, encoder: str = "CLIP", **vft) -> dict:
    """Return options that make the miniature a LLaVA: another encoder, an MLP, a method."""
    return {
        **options,
        "model.vision.backbone.type": encoder,
        "model.projector": {"_delete_": True, "type": "MLPProjector"},
        **({"model.vision.vft": {"_delete_": True, **vft}} if vft else {}),
    }
