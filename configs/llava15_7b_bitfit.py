"""LLaVA-1.5-7B, BitFit: CoVFT's Table 1, 7B "BitFit" (the paper's mean: 59.57)."""

from mmengine.config import read_base

with read_base():
    from .llava15_7b_freeze import *

from covft.vft import BitFit

model.vision.vft = dict(type=BitFit)
