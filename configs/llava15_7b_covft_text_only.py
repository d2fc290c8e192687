"""CoVFT with the text alone as context.

Table 2, "Text-only" (the paper's mean: 60.55).
CVE is llava15_7b_covft.py, N/A llava15_7b_full.py.
"""

from mmengine.config import read_base

with read_base():
    from .llava15_7b_covft import *

model.vision.vft.context = "text-only"
