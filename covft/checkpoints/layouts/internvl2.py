"""InternVL2's own files, OpenGVLab/InternVL2-* (Chen et al., 2024, arXiv:2404.16821)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from covft.checkpoints.layouts.base import Layout
from covft.models.mllm import MLLM
from covft.models.projectors import PixelShuffleProjector
from covft.models.vision.internvit import InternViT

# The family's table lists transformers' names first, then OpenGVLab's; the last is written here.
_ENCODER = replace(
    InternViT.layout,
    names={own: public[-1:] for own, public in InternViT.layout.names.items()},
)
_QUERY = re.compile(r"(.*\.attn\.)q_proj(\.(?:weight|bias))")


class _InternVL2(Layout):
    def _export(self, plain: Mapping[str, Tensor], model: MLLM) -> dict[str, Tensor]:
        if not isinstance(model.vision.backbone, InternViT):
            raise ValueError(
                f"layout '{self.name}' holds InternViT, but the model's encoder is "
                f"{type(model.vision.backbone).__name__}"
            )
        # Refuses what isn't a plain encoder's.
        super()._export(plain, model)
        return _fused_qkv(_ENCODER.to_public(plain))


def _fused_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join query, key and value projections, (D, D) each, to one of (3 D, D), in that order."""
    fused: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = _QUERY.fullmatch(name)
        if match:
            parts = [state[f"{match[1]}{which}_proj{match[2]}"] for which in "qkv"]
            fused[f"{match[1]}qkv{match[2]}"] = torch.cat(parts)
        elif ".attn.k_proj." not in name and ".attn.v_proj." not in name:
            fused[name] = tensor
    return fused


INTERNVL2 = _InternVL2(
    name="internvl2",
    holds="InternVL2's own code (OpenGVLab/InternVL2-*)",
    prefixes={
        "vision.": ("vision_model.",),
        "projector.": ("mlp1.",),
        "llm.model.": ("language_model.",),
    },
    projectors={PixelShuffleProjector: {"layers.": ""}},
    marks=(r"mlp1\.", r"language_model\.", r"vision_model\."),
)
