"""LLaVA-1.5-7B, QA-ViT: CoVFT's appendix B (the paper's mean: 59.12)."""

from mmengine.config import read_base

with read_base():
    from .llava15_7b_freeze import *

from covft.vft import QAViT

model.vision.vft = dict(type=QAViT)
