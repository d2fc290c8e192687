"""LLaVA in transformers: LlavaForConditionalGeneration, llava-hf/llava-1.5-*.

Files have the names of transformers before 4.52, which transformers 5 writes too; its names in
memory are read as well.

transformers' conversion adds ``<image>`` and ``<pad>`` to the LLM's vocabulary, and pads it to a
multiple of 64 (32,000 rows become 32,064). Here no token stands for an image, so rows beyond the
model's vocabulary are left out, with a warning, if they are no more than these.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from mmengine.logging import print_log
from torch import Tensor

from covft.checkpoints.layouts.base import Layout
from covft.models.mllm import MLLM
from covft.models.projectors import MLPProjector

_ADDED_TOKENS, _MULTIPLE = 2, 64


class _HFLlava(Layout):
    def _read_other(
        self, prefix: str, part: Mapping[str, Tensor], model: MLLM
    ) -> dict[str, Tensor]:
        vocabulary = model.llm.model.get_input_embeddings().weight.shape[0]
        padded = -(-(vocabulary + _ADDED_TOKENS) // _MULTIPLE) * _MULTIPLE
        by_word = ("embed_tokens.weight", "weight" if prefix.endswith("lm_head.") else "")
        read = dict(part)
        for name, tensor in part.items():
            if name in by_word and vocabulary < len(tensor) <= padded:
                read[name] = tensor[:vocabulary]
                print_log(
                    f"hf-llava: {prefix}{name} has {len(tensor)} rows, the model's vocabulary "
                    f"{vocabulary}; the last {len(tensor) - vocabulary} are left out, taken for "
                    "<image>, <pad> and padding to a multiple of 64, which no text here needs",
                    logger="current",
                    level=logging.WARNING,
                )
        return {prefix + name: tensor for name, tensor in read.items()}


HF_LLAVA = _HFLlava(
    name="hf-llava",
    holds="LLaVA in transformers (llava-hf/llava-1.5-*)",
    prefixes={
        "vision.": ("vision_tower.", "model.vision_tower."),
        "projector.": ("multi_modal_projector.", "model.multi_modal_projector."),
        "llm.model.model.": ("language_model.model.", "model.language_model."),
        "llm.model.lm_head.": ("language_model.lm_head.", "lm_head."),
    },
    projectors={MLPProjector: {"layers.0.": "linear_1.", "layers.2.": "linear_2."}},
    marks=(r"(model\.)?multi_modal_projector\.linear_1\.", r"(model\.)?vision_tower\."),
)
