"""Whether two runs differ by more than the choice of questions explains: a paired bootstrap.

The units of a benchmark (a question, or what is scored together) are drawn anew with replacement,
the same for both runs, and the difference of the metric is taken each time (Efron and Tibshirani,
"An Introduction to the Bootstrap", 1993; Koehn, "Statistical Significance Tests for Machine
Translation Evaluation", EMNLP 2004). A benchmark of several parts, such as MME's subtasks, is drawn
part by part. Training anew with another seed is a further source of difference that one pair of
runs tells nothing about.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

#: Draws of one call of the generator at most: 64 MB of counts.
_MAX_COUNTS = 8_000_000
_NUM_SHOWN = 3


@dataclass(frozen=True)
class Comparison:
    """How much better the second run is than the first, in the metric's unit.

    Attributes:
        difference: Of the metrics.
        low: Lower end of the 95 % percentile interval.
        high: Its upper end.
        p_value: Two-sided: twice the share of draws in which the sign is the other one, or zero.
        num_units: Units that both runs answered.
        num_better: Units on which the second run's score is higher.
        num_worse: Units on which it is lower.
    """

    difference: float
    low: float
    high: float
    p_value: float
    num_units: int
    num_better: int
    num_worse: int


def compare_scores(
    first: Mapping[str, float],
    second: Mapping[str, float],
    *,
    strata: Mapping[str, str] | None = None,
    max_score: float = 100.0,
    num_draws: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare two runs' scores of the same units.

    Args:
        first: Each unit's score in [0, 1], see :meth:`covft.evaluation.Benchmark.item_scores`.
        second: Likewise, of the run that is compared with it.
        strata: The part that a unit is averaged in; those that aren't named share one.
        max_score: The metric's largest value.
        num_draws: How often the units are drawn.
        seed: Of the draws.

    Raises:
        ValueError: If the runs scored different units, or none.
    """
    _check_same_units(first, second)
    parts: dict[str, list[float]] = {}
    for unit, score in first.items():
        parts.setdefault((strata or {}).get(unit, ""), []).append(second[unit] - score)
    differences = [np.array(values) for values in parts.values()]
    scale = max_score / len(differences)
    rng = np.random.default_rng(seed)
    drawn = scale * sum(_drawn_means(values, num_draws, rng) for values in differences)
    low, high = np.quantile(drawn, [0.025, 0.975])
    # One more draw than there were, the observed one: the value is never 0.
    tails = [(1 + np.sum(drawn <= 0)) / (num_draws + 1), (1 + np.sum(drawn >= 0)) / (num_draws + 1)]
    every = np.concatenate(differences)
    return Comparison(
        difference=float(scale * sum(values.mean() for values in differences)),
        low=float(low),
        high=float(high),
        p_value=float(min(1.0, 2 * min(tails))),
        num_units=len(every),
        num_better=int((every > 0).sum()),
        num_worse=int((every < 0).sum()),
    )


def _drawn_means(values: np.ndarray, num_draws: int, rng: np.random.Generator) -> np.ndarray:
    """Return the means of so many draws of all values with replacement, (num_draws,).

    How often each distinct value is drawn is multinomial; scores have few distinct values.
    """
    distinct, counts = np.unique(values, return_counts=True)
    shares = counts / counts.sum()
    means = np.empty(num_draws)
    step = max(1, _MAX_COUNTS // len(distinct))
    for start in range(0, num_draws, step):
        size = min(step, num_draws - start)
        drawn = rng.multinomial(len(values), shares, size=size)
        means[start : start + size] = drawn @ distinct / len(values)
    return means


def _check_same_units(first: Mapping[str, float], second: Mapping[str, float]) -> None:
    only_first, only_second = first.keys() - second.keys(), second.keys() - first.keys()
    if only_first or only_second:
        shown = ", ".join(f"'{unit}'" for unit in sorted(only_first | only_second)[:_NUM_SHOWN])
        raise ValueError(
            f"the runs answered different questions: {len(only_first)} of {len(first)} only the "
            f"first, {len(only_second)} of {len(second)} only the second, such as {shown}; score "
            "both with the same --limit and files"
        )
    if not first:
        raise ValueError("there are no scores to compare")
