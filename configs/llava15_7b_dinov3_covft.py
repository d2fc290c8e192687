"""LLaVA-1.5-7B on DINOv3-L/16, CoVFT: Table 3 (the paper's mean: 54.80)."""

from mmengine.config import read_base

with read_base():
    from .llava15_7b_dinov3_freeze import *

from covft.vft import CoVFT

model.vision.vft = dict(type=CoVFT)
