"""CoVFT in blocks 0 to 10: Table 4, 11 layers (the paper's mean: 59.33)."""

from mmengine.config import read_base

with read_base():
    from .llava15_7b_covft import *

model.vision.vft.first_block = 0
model.vision.vft.last_block = 10
