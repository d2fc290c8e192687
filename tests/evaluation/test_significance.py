import time

import numpy as np
import pytest

from covft.evaluation.significance import compare_scores


def coin(count: int, share: float, seed: int) -> dict[str, float]:
    draws = np.random.default_rng(seed).random(count) < share
    return {str(index): float(draw) for index, draw in enumerate(draws)}


def test_equal_runs_do_not_differ() -> None:
    scores = coin(50, 0.5, 0)
    found = compare_scores(scores, scores)
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    assert (found.num_better, found.num_worse, found.num_units) == (0, 0, 50)


def test_the_interval_is_the_normal_one_for_many_questions() -> None:
    first, second = coin(4000, 0.5, 1), coin(4000, 0.6, 2)
    found = compare_scores(first, second)
    differences = np.array([second[key] - first[key] for key in first])
    error = 100 * differences.std() / np.sqrt(4000)
    assert found.difference == pytest.approx(100 * differences.mean())
    assert found.low == pytest.approx(found.difference - 1.96 * error, abs=0.15)
    assert found.high == pytest.approx(found.difference + 1.96 * error, abs=0.15)
    assert found.p_value < 0.001
    assert found.num_better == int((differences > 0).sum())


def test_pairing_sees_what_two_separate_intervals_would_not() -> None:
    first = coin(1000, 0.5, 3)
    second = dict(first)
    for key in [key for key, score in first.items() if score == 0][:15]:
        second[key] = 1.0
    found = compare_scores(first, second)  # 1.5 points; a score alone has +-3.1
    assert found.low > 0 and found.p_value < 0.01


def test_chance_differences_are_called_so_as_often_as_they_should_be() -> None:
    p_values = [
        compare_scores(coin(200, 0.5, 2 * n), coin(200, 0.5, 2 * n + 1), num_draws=1000).p_value
        for n in range(300)
    ]
    assert 0.02 < np.mean(np.array(p_values) < 0.05) < 0.09


def test_parts_are_averaged_and_drawn_apart() -> None:
    first = {"a": 0.0, "b": 0.0, "c": 1.0}
    second = {"a": 1.0, "b": 1.0, "c": 0.5}
    strata = {"a": "x", "b": "x", "c": "y"}
    found = compare_scores(first, second, strata=strata, max_score=2000)
    # Each part has equal differences, so that no draw varies: 1000 * 1 - 1000 * 0.5.
    assert (found.difference, found.low, found.high) == (500, 500, 500)


def test_draws_are_seeded() -> None:
    first, second = coin(40, 0.5, 5), coin(40, 0.7, 6)
    assert compare_scores(first, second) == compare_scores(first, second)
    assert compare_scores(first, second) != compare_scores(first, second, seed=1)


def test_other_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 only the first, 2 of 3 only the second, such as"):
        compare_scores({"a": 1, "b": 0}, {"b": 1, "c": 0, "d": 0})
    with pytest.raises(ValueError, match="no scores"):
        compare_scores({}, {})


def test_gqa_takes_a_moment() -> None:
    first, second = coin(12_578, 0.62, 7), coin(12_578, 0.63, 8)
    started = time.perf_counter()
    compare_scores(first, second)
    assert time.perf_counter() - started < 2
    # Scores that are all distinct, as those of captions.
    rng = np.random.default_rng(9)
    first, second = ({str(n): rng.random() for n in range(1000)} for _ in range(2))
    compare_scores(first, second, num_draws=2000)
