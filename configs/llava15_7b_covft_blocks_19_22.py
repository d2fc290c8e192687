"""CoVFT in blocks 19 to 22: Table 4, 4 layers and Table 7, "N = 4" (the paper's mean: 59.98)."""

from mmengine.config import read_base

with read_base():
    from .llava15_7b_covft import *

model.vision.vft.first_block = 19
model.vision.vft.last_block = 22
