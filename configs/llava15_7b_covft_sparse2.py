"""CoVFT with the two experts of the largest gates.

Table 2, "Sparse@2" (the paper's mean: 60.10).
Dense routing is llava15_7b_covft.py.
"""

from mmengine.config import read_base

with read_base():
    from .llava15_7b_covft import *

model.vision.vft.routing = "sparse@2"
