"""LLaVA-1.5-13B, BitFit: CoVFT's Table 1, 13B "BitFit" (the paper's mean: 61.43)."""

from mmengine.config import read_base

with read_base():
    from .llava15_13b_freeze import *

from covft.vft import BitFit

model.vision.vft = dict(type=BitFit)
