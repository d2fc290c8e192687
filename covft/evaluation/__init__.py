"""Benchmarks, and running them."""

from covft.evaluation.benchmark import Benchmark, Item
from covft.evaluation.easy_vqa import EasyVQA
from covft.evaluation.evaluate import EvaluationResult, evaluate, weights_fingerprint

__all__ = ["Benchmark", "EasyVQA", "EvaluationResult", "Item", "evaluate", "weights_fingerprint"]
