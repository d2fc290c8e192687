"""LLaVA-1.5-7B, Full: CoVFT's Table 1, 7B "Full fine-tuning" (the paper's mean: 59.29)."""

from mmengine.config import read_base

with read_base():
    from .llava15_7b_freeze import *

from covft.vft import Full

model.vision.vft = dict(type=Full)
