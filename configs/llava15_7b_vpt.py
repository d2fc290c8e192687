"""LLaVA-1.5-7B, VPT: CoVFT's Table 1, 7B "VPT" (the paper's mean: 58.19)."""

from mmengine.config import read_base

with read_base():
    from .llava15_7b_freeze import *

from covft.vft import VPT

model.vision.vft = dict(type=VPT)
