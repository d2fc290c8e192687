"""LLaVA-1.5-7B, CoVFT: CoVFT's Table 1, 7B "CoVFT" (the paper's mean: 61.08)."""

from mmengine.config import read_base

with read_base():
    from .llava15_7b_freeze import *

from covft.vft import CoVFT

model.vision.vft = dict(type=CoVFT)
