"""How public files name and shape the weights of a whole MLLM, read and written.

A layout maps between a file's names and those of :class:`~covft.models.mllm.MLLM`::

    layout = LAYOUTS["llava"]
    ours = layout.to_ours(public, model)              # raises where the file isn't for this model
    public = layout.from_ours(None, model)            # the model's own weights under public names
    public = layout.from_ours(state, model)           # or those of a state dict under our names

``from_ours(None, model)`` takes ``layout.state_dict(model)``: for most layouts the model as a plain
one (:func:`plain_state_dict`; LoRA merged, CoVFT refused), for ``covft`` the model as it is. The
result's tensors are views of the state's where possible, some of one storage, and tied weights
are left out: make them contiguous copies before writing safetensors. Blocks that the encoder
doesn't build (CLIP's last, which LLaVA never reads) aren't part of it.

============ ========================================================= ========================
name         files                                                     encoder, projector
============ ========================================================= ========================
covft        CoVFT's public code (weeknan/CoVFT): llava, methods, BERT CLIP; MLP or linear
llava        liuhaotian/llava-v1.5-*; the vision tower may be absent   any; MLP or linear
mm_projector LLaVA's stage 1, ``mm_projector.bin``                     any; MLP or linear
hf-llava     transformers' LlavaForConditionalGeneration, any version  any; MLP of depth 2
internvl2    OpenGVLab/InternVL2-*                                     InternViT; pixel shuffle
hf-internvl  transformers' InternVLForConditionalGeneration            InternViT; pixel shuffle
xtuner       xtuner 0.2's LLaVAModel; what was frozen may be absent    any; MLP or linear
============ ========================================================= ========================
"""

from __future__ import annotations

from collections.abc import Collection

from covft.checkpoints.layouts.base import Layout, plain_state_dict
from covft.checkpoints.layouts.covft import COVFT, infer_method
from covft.checkpoints.layouts.hf_internvl import HF_INTERNVL
from covft.checkpoints.layouts.hf_llava import HF_LLAVA
from covft.checkpoints.layouts.internvl2 import INTERNVL2
from covft.checkpoints.layouts.llava import LLAVA
from covft.checkpoints.layouts.mm_projector import MM_PROJECTOR
from covft.checkpoints.layouts.xtuner import XTUNER

#: Every layout by its name; detected in this order, the special before the general.
LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (COVFT, LLAVA, MM_PROJECTOR, HF_INTERNVL, HF_LLAVA, INTERNVL2, XTUNER)
}


def detect_layout(names: Collection[str]) -> Layout | None:
    """Return the layout that a file's names are in, or None if it is none of :data:`LAYOUTS`."""
    return next((layout for layout in LAYOUTS.values() if layout.detect(names)), None)


__all__ = ["LAYOUTS", "Layout", "detect_layout", "infer_method", "plain_state_dict"]
