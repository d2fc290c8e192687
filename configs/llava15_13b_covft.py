"""LLaVA-1.5-13B, CoVFT: CoVFT's Table 1, 13B "CoVFT" (the paper's mean: 62.90)."""

from mmengine.config import read_base

with read_base():
    from .llava15_13b_freeze import *

from covft.vft import CoVFT

model.vision.vft = dict(type=CoVFT)
