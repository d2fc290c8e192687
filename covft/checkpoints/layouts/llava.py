"""LLaVA's own files, liuhaotian/llava-v1.5-* (Liu et al., CVPR 2024)."""

from __future__ import annotations

from covft.checkpoints.layouts.base import Layout
from covft.models.projectors import LinearProjector, MLPProjector

#: ``mm_projector`` is a Sequential, or one Linear.
LLAVA_PROJECTORS = {MLPProjector: {"layers.": ""}, LinearProjector: {"linear.": ""}}

LLAVA = Layout(
    name="llava",
    holds="LLaVA's own code (liuhaotian/llava-v1.5-*)",
    prefixes={
        "vision.": ("model.vision_tower.vision_tower.",),
        "projector.": ("model.mm_projector.",),
        "llm.model.model.": ("model.",),
        "llm.model.lm_head.": ("lm_head.",),
    },
    projectors=LLAVA_PROJECTORS,
    marks=(r"model\.mm_projector\.", r"model\.(layers|embed_tokens)\."),
    # LLaVA-1.5 left the vision tower frozen, and out of its files.
    optional=frozenset({"vision"}),
)
