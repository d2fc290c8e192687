"""Quickstart: the same as quickstart_covft.py in everything but the method, Full."""

from mmengine.config import read_base

with read_base():
    from .quickstart_covft import *

from covft.vft import Full

model.vision.vft = dict(type=Full)
