"""Does an exported model answer as the run does? One image, one question, all logits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from PIL import Image
from torch import Tensor

from covft.checkpoints.export.folder import UnverifiedExportError
from covft.checkpoints.run import Run
from covft.config import stage_configs
from covft.datasets.prompts import Prompt, collate_prompts
from covft.models.mllm import MLLM

QUESTION = "What is in the image?"


def probe_image() -> Image.Image:
    """Return an image that isn't square, and isn't smooth."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((400, 300), Image.Resampling.NEAREST)


@dataclass(frozen=True)
class Probe:
    """What a run answers, and what it takes to ask another model the same.

    Attributes:
        batch: The inputs, on the CPU.
        logits: The run's, (T, V), computed in float32, on the CPU.
        stage: The config that the run's model was built from.
        seed: The run's.
    """

    batch: dict[str, Any]
    logits: Tensor
    stage: Config
    seed: int

    @classmethod
    def of(cls, run: Run) -> Probe:
        """Ask a run, wherever its model is; the model is in float32 then."""
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}]
        prompt = Prompt("probe", turns, [probe_image()])
        batch = collate_prompts([prompt], run.spec, resize=run.resize)
        stage = stage_configs(run.config)[-1][1]
        logits = float32_logits(run.model, batch)
        return cls(batch, logits, stage, run.config.get("seed", 0))


@torch.no_grad()
def float32_logits(model: MLLM, batch: Mapping[str, Any]) -> Tensor:
    """Return a model's logits, (T, V) on the CPU, and leave the model in float32.

    4-bit weights stay, and their products are in float32 too.
    """
    for module in model.float().modules():
        if hasattr(module, "compute_dtype"):  # bitsandbytes'
            setattr(module, "compute_dtype", torch.float32)  # noqa: B010 - not known to types
    batch = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    mask = batch.pop("attention_mask")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        states = model.llm.hidden_states(model.embeddings(**batch), mask)
        return model.llm.logits(states)[0].float().cpu()


def compare(expected: Tensor, found: Tensor, *, loader: str) -> float:
    """Compare float32 logits (T, V); more tokens in ``found``'s vocabulary are left out.

    Args:
        expected: The run's.
        found: The exported model's.
        loader: What loaded it, for the error.

    Returns:
        The largest difference, relative to the largest logit.

    Raises:
        UnverifiedExportError: If it is no number.
    """
    found = found.float().cpu()[:, : expected.shape[1]]
    error = float((found - expected).abs().max() / expected.abs().max())
    if not math.isfinite(error):
        raise UnverifiedExportError(
            f"the exported model, loaded by {loader}, gives logits that are no numbers; float16 "
            "ends at 65,504, --dtype bfloat16 has the range of float32."
        )
    return error
