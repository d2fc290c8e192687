"""Quickstart: the same as quickstart_covft.py in everything but the method, Freeze."""

from mmengine.config import read_base

with read_base():
    from .quickstart_covft import *

from covft.vft import Freeze

model.vision.vft = dict(type=Freeze)
