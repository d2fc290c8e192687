"""LLaVA-1.5-7B, LoRA of rank 512: CoVFT's Table 7 (the paper's mean: 59.20).

The paper gives the rank alone; alpha keeps rank 8's ratio (choice).
"""

from mmengine.config import read_base

with read_base():
    from .llava15_7b_freeze import *

from covft.vft import LoRA

model.vision.vft = dict(type=LoRA, rank=512, alpha=1024.0)
