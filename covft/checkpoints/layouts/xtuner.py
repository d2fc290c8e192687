"""LLaVA in xtuner 0.2: the ``.pth`` files of ``LLaVAModel`` (InternLM/xtuner).

They hold what was trained: the projector, and LLM and visual encoder where they weren't frozen.
LoRA's factors can't be read, since the files don't say their scale.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from covft.checkpoints.layouts.base import Layout
from covft.models.mllm import MLLM
from covft.models.projectors import LinearProjector, MLPProjector
from covft.registry import shortened


class _XTuner(Layout):
    def to_ours(self, state: Mapping[str, Tensor], model: MLLM) -> dict[str, Tensor]:
        lora = [name for name in state if ".lora_" in name or ".base_model." in name]
        if lora:
            raise ValueError(
                f"the file holds {len(lora)} LoRA weights ({shortened(sorted(lora))}), and not "
                "their scale (lora_alpha): merge them with xtuner first (`xtuner convert "
                "pth_to_hf` and `xtuner convert merge`)"
            )
        return super().to_ours(state, model)


XTUNER = _XTuner(
    name="xtuner",
    holds="xtuner 0.2's LLaVAModel",
    prefixes={
        "vision.": ("visual_encoder.",),
        "projector.": ("projector.",),
        "llm.model.": ("llm.",),
    },
    projectors={MLPProjector: {"layers.": "model."}, LinearProjector: {"linear.": "model.0."}},
    marks=(
        r"projector\.model\.|visual_encoder\."
        r"|llm\.(base_model|lm_head|model\.(layers|embed_tokens|norm))\.",
    ),
    optional=frozenset({"vision", "llm", "projector"}),
)
