"""CoVFT with two experts drawn at random.

Table 2, "Random@2" (the paper's mean: 59.00).
Dense routing is llava15_7b_covft.py.
"""

from mmengine.config import read_base

with read_base():
    from .llava15_7b_covft import *

model.vision.vft.routing = "random@2"
