"""CoVFT with image and text side by side as context.

Table 2, "Concat[I, T]" (the paper's mean: 60.44).
CVE is llava15_7b_covft.py, N/A llava15_7b_full.py.
"""

from mmengine.config import read_base

with read_base():
    from .llava15_7b_covft import *

model.vision.vft.context = "concat"
