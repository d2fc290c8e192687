"""InternVL 2.0, CoVFT: CoVFT's Table 3, InternVL 2.0 "CoVFT" (the paper's mean: 70.11)."""

from mmengine.config import read_base

with read_base():
    from .internvl2_full import *

from covft.vft import CoVFT

model.vision.vft = dict(type=CoVFT)
