"""InternVL in transformers: InternVLForConditionalGeneration, OpenGVLab/InternVL3-*-hf.

Files have the names of transformers before 4.52, which transformers 5 writes too; its names in
memory are read as well.
"""

from __future__ import annotations

from covft.checkpoints.layouts.base import Layout
from covft.models.projectors import PixelShuffleProjector

HF_INTERNVL = Layout(
    name="hf-internvl",
    holds="InternVL in transformers (InternVLForConditionalGeneration)",
    prefixes={
        "vision.": ("vision_tower.", "model.vision_tower."),
        "projector.": ("multi_modal_projector.", "model.multi_modal_projector."),
        "llm.model.model.": ("language_model.model.", "model.language_model."),
        "llm.model.lm_head.": ("language_model.lm_head.", "lm_head."),
    },
    projectors={
        PixelShuffleProjector: {
            "layers.0.": "layer_norm.",
            "layers.1.": "linear_1.",
            "layers.3.": "linear_2.",
        }
    },
    marks=(r"(model\.)?multi_modal_projector\.layer_norm\.", r"(model\.)?vision_tower\."),
)
