"""LLaVA-1.5-7B, SVPT: CoVFT's Table 1, 7B "SVPT" (the paper's mean: 58.70)."""

from mmengine.config import read_base

with read_base():
    from .llava15_7b_freeze import *

from covft.vft import SVPT

model.vision.vft = dict(type=SVPT)
