"""CoVFT with averaged visual tokens as context.

Table 2, "Image-only" (the paper's mean: 59.77).
CVE is llava15_7b_covft.py, N/A llava15_7b_full.py.
"""

from mmengine.config import read_base

with read_base():
    from .llava15_7b_covft import *

model.vision.vft.context = "image-only"
