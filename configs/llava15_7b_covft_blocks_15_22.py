"""CoVFT in blocks 15 to 22: Table 4, 8 layers (the paper's mean: 59.87)."""

from mmengine.config import read_base

with read_base():
    from .llava15_7b_covft import *

model.vision.vft.first_block = 15
model.vision.vft.last_block = 22
