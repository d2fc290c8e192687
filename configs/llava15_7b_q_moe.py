"""LLaVA-1.5-7B, Q-MoE: CoVFT's appendix B (the paper's mean: 59.29)."""

from mmengine.config import read_base

with read_base():
    from .llava15_7b_freeze import *

from covft.vft import QMoE

model.vision.vft = dict(type=QMoE)
