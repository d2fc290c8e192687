"""CoVFT with 8 experts a layer: Table 5 (the paper's mean: 60.82)."""

from mmengine.config import read_base

with read_base():
    from .llava15_7b_covft import *

model.vision.vft.num_experts = 8
