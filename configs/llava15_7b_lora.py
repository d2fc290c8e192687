"""LLaVA-1.5-7B, LoRA: CoVFT's Table 1, 7B "LoRA" (the paper's mean: 59.04)."""

from mmengine.config import read_base

with read_base():
    from .llava15_7b_freeze import *

from covft.vft import LoRA

model.vision.vft = dict(type=LoRA)
