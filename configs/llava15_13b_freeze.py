"""LLaVA-1.5-13B, frozen encoder: CoVFT's Table 1, 13B "Freeze" (the paper's mean: 61.43)."""

from mmengine.config import read_base

with read_base():
    from ._base_.llm.vicuna_13b import llm as _llm
    from .llava15_7b_freeze import *

model.llm = dict(**_llm, checkpointing=True)
