"""Benchmarks, running them, and reports.

What is imported here needs no torch, so that reports and checks of data answer at once.
:func:`covft.evaluation.evaluate.evaluate` asks a model.
"""

from covft.evaluation.benchmark import Benchmark, Item
from covft.evaluation.benchmarks import (
    AI2D,
    GQA,
    MME,
    MMVP,
    OCRVQA,
    OKVQA,
    COCOCaptions,
    CVBench,
    EasyVQA,
    Flickr30k,
    IconQA,
    MMBench,
    RealWorldQA,
    ScienceQA,
    TextVQA,
)
from covft.evaluation.predictions import read_predictions
from covft.evaluation.sharding import Ranks

__all__ = [
    "AI2D",
    "GQA",
    "MME",
    "MMVP",
    "OCRVQA",
    "OKVQA",
    "Benchmark",
    "COCOCaptions",
    "CVBench",
    "EasyVQA",
    "Flickr30k",
    "IconQA",
    "Item",
    "MMBench",
    "Ranks",
    "RealWorldQA",
    "ScienceQA",
    "TextVQA",
    "read_predictions",
]
