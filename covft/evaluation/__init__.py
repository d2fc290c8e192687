"""Benchmarks, and running them."""

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
from covft.evaluation.evaluate import (
    EvaluationResult,
    evaluate,
    infer,
    predictions_path,
    score_predictions,
    weights_fingerprint,
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
    "EvaluationResult",
    "Flickr30k",
    "IconQA",
    "Item",
    "MMBench",
    "Ranks",
    "RealWorldQA",
    "ScienceQA",
    "TextVQA",
    "evaluate",
    "infer",
    "predictions_path",
    "read_predictions",
    "score_predictions",
    "weights_fingerprint",
]
