"""Does an exported model answer as the run does? One image, one question, all logits."""

from __future__ import annotations

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
#: Largest difference of logits, relative to the largest logit: float32 sums in another order, and
#: steps of a 16-bit type over some tens of layers.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
COARSE = 3e-2


def probe_image() -> Image.Image:
    """Return an image that isn't square, and isn't smooth."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((400, 300), Image.Resampling.NEAREST)


@dataclass(frozen=True)
class Probe:
    """What a run answers, and what it takes to ask another model the same.

    Attributes:
        batch: The inputs, on the CPU.
        logits: The run's, (T, V), on the CPU.
        dtype: The type that both models' differences come from: of the exported weights, or a
            coarser one that the run computes in.
        stage: The config that the run's model was built from.
        seed: The run's.
    """

    batch: dict[str, Any]
    logits: Tensor
    dtype: torch.dtype
    stage: Config
    seed: int

    @classmethod
    def of(cls, run: Run, *, dtype: torch.dtype) -> Probe:
        """Ask a run, wherever its model is.

        Args:
            run: The run.
            dtype: The type of the exported weights.
        """
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}]
        prompt = Prompt("probe", turns, [probe_image()])
        batch = collate_prompts([prompt], run.spec, resize=run.resize)
        stage = stage_configs(run.config)[-1][1]
        if stage.model.llm.get("quantization"):
            dtype = torch.bfloat16  # of its products
        logits = run_logits(run.model, batch)
        return cls(batch, logits, dtype, stage, run.config.get("seed", 0))


@torch.no_grad()
def run_logits(model: MLLM, batch: Mapping[str, Any]) -> Tensor:
    """Return the run's own logits, (T, V) on the CPU."""
    batch = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    mask = batch.pop("attention_mask")
    states = model.llm.hidden_states(model.embeddings(**batch), mask)
    return model.llm.logits(states)[0].float().cpu()


def compare(expected: Tensor, found: Tensor, *, dtype: torch.dtype, loader: str) -> float:
    """Compare logits (T, V); more tokens in ``found``'s vocabulary are left out.

    Args:
        expected: The run's.
        found: The exported model's.
        dtype: The type that the exported model computes in.
        loader: What loaded it, for the error.

    Returns:
        The largest difference, relative to the largest logit.

    Raises:
        UnverifiedExportError: If it is above the tolerance.
    """
    found = found.float().cpu()[:, : expected.shape[1]]
    error = float((found - expected).abs().max() / expected.abs().max())
    limit = TOLERANCE.get(dtype, COARSE)
    if not error <= limit:  # also where it is no number
        raise UnverifiedExportError(
            f"the exported model, loaded by {loader}, doesn't give the run's logits: they differ "
            f"by {error:.2g} of the largest, {limit:g} is allowed."
        )
    return error
