"""CoVFT with all experts weighted alike.

Table 2, "Uniform" (the paper's mean: 59.60).
Dense routing is llava15_7b_covft.py.
"""

from mmengine.config import read_base

with read_base():
    from .llava15_7b_covft import *

model.vision.vft.routing = "uniform"
