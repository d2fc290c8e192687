"""LLaVA-1.5-7B on DINOv3-L/16, frozen: CoVFT's Table 3 (the paper's mean: 52.25)."""

from mmengine.config import read_base

with read_base():
    from ._base_.vision.dinov3_l_384 import vision_backbone as _encoder
    from .llava15_7b_freeze import *

model.vision.backbone = dict(**_encoder, checkpointing=True)
