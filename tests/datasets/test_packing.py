import time

import numpy as np
import pytest

from covft.datasets import CostModel
from covft.datasets.packing import balanced_bins


def tokens_of(count, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.random(count) < 0.94
    text = np.minimum(rng.lognormal(5.4, 0.8, count), 2048 - 576 * image)
    return (576 * image + text + 1).astype(int)


def loads_of(costs, bins):
    return np.array([costs[members].sum() for members in bins])


@pytest.mark.parametrize(("count", "num_bins"), [(1, 1), (5, 5), (7, 3), (128, 32), (256, 64)])
def test_every_sample_is_in_one_bin_and_no_bin_is_empty(count, num_bins):
    bins = balanced_bins(tokens_of(count), num_bins)
    assert len(bins) == num_bins
    assert all(members and members == sorted(members) for members in bins)
    assert sorted(i for members in bins for i in members) == list(range(count))


def test_bins_are_even_and_the_dearest_first():
    costs = tokens_of(128)
    loads = loads_of(costs, balanced_bins(costs, 32))
    assert loads[0] <= 1.01 * loads.mean()
    assert (np.diff(loads) <= 0).all()


def test_swaps_even_out_what_dealing_out_leaves():
    # Dealt out, the dearest first, these make 8 + 5 + 4 = 17 against 7 + 6 = 13; 15 and 15 are
    # possible.
    costs = np.array([8.0, 7.0, 6.0, 5.0, 4.0])
    assert loads_of(costs, balanced_bins(costs, 2)).tolist() == [15.0, 15.0]


def test_one_sample_may_outweigh_all_others():
    costs = np.array([1.0, 100.0, 1.0, 1.0])
    assert balanced_bins(costs, 2) == [[1], [0, 2, 3]]
    assert balanced_bins(np.ones(4), 4) == [[0], [1], [2], [3]]


def test_a_plan_takes_no_time_to_speak_of():
    costs = tokens_of(1024)
    started = time.process_time()
    for _ in range(5):
        balanced_bins(costs, 128)
    # About 10 ms each; the steps that they belong to take seconds.
    assert time.process_time() - started < 5 * 0.2


def test_the_same_costs_make_the_same_bins():
    costs = tokens_of(64)
    assert balanced_bins(costs, 16) == balanced_bins(costs.copy(), 16)


@pytest.mark.parametrize(
    ("costs", "num_bins", "message"),
    [([1.0], 2, "1 samples can't fill 2 bins"), ([1.0, 0.0], 1, "must be positive, got 0.0")],
)
def test_what_cannot_be_packed(costs, num_bins, message):
    with pytest.raises(ValueError, match=message):
        balanced_bins(np.array(costs), num_bins)


def test_costs_are_linear_and_quadratic():
    model = CostModel(2.0, 0.5, 100.0)
    found = model.costs(np.array([10, 4, 0]), np.array([0, 3, 0]))
    assert found.tolist() == [20 + 50, 8 + 8 + 300, 2.5]  # as an unusable one, one token
    with pytest.raises(ValueError, match="per_token must be positive"):
        CostModel(0.0)
