"""CoVFT in blocks 0 to 22: Table 4, 23 layers (the paper's mean: 60.23)."""

from mmengine.config import read_base

with read_base():
    from .llava15_7b_covft import *

model.vision.vft.first_block = 0
model.vision.vft.last_block = 22
