"""LLaVA-1.5-13B, Full: CoVFT's Table 1, 13B "Full fine-tuning" (the paper's mean: 61.30)."""

from mmengine.config import read_base

with read_base():
    from .llava15_13b_freeze import *

from covft.vft import Full

model.vision.vft = dict(type=Full)
