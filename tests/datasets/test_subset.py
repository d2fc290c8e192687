import itertools

import numpy as np
import pytest

from covft.datasets import InstructDataset
from covft.datasets.subset import subset


def test_parts_are_nested_and_as_large_as_said():
    parts = [subset(1000, fraction, seed=3) for fraction in (0.125, 0.25, 0.5, 1.0)]
    assert [len(part) for part in parts] == [125, 250, 500, 1000]
    for small, large in itertools.pairwise(parts):
        assert set(small) < set(large)
    assert all((np.diff(part) > 0).all() for part in parts)
    assert set(parts[0]) != set(subset(1000, 0.125, seed=4))
    assert 30 < (parts[0] < 500).sum() < 95  # from everywhere
    assert len(subset(3, 0.01, seed=0)) == 1


def test_a_dataset_of_a_fraction(spec, record):
    records = [record(str(i)) for i in range(40)] + [record("bad", texts=())]
    whole = InstructDataset(records, spec=spec)
    half = InstructDataset(records, spec=spec, fraction=0.5)
    eighth = InstructDataset(records, spec=spec, fraction=0.125)
    ids = [{part[i].id for i in range(len(part))} for part in (whole, half, eighth)]
    assert [len(found) for found in ids] == [40, 20, 5]
    assert ids[2] < ids[1] < ids[0]
    assert len(half.lengths()) == len(half.sizes().squares) == 20
    other = InstructDataset(records, spec=spec, fraction=0.5, fraction_seed=1)
    assert {other[i].id for i in range(20)} != ids[1]
    assert [bad.id for bad in half.bad] == ["bad"]


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01])
def test_fractions_out_of_range(spec, record, fraction):
    with pytest.raises(ValueError, match=f"at most 1, got {fraction}"):
        InstructDataset([record("x")], spec=spec, fraction=fraction)


def test_a_seed_without_a_fraction_is_an_error(spec, record):
    with pytest.raises(ValueError, match="fraction_seed=3 has no effect"):
        InstructDataset([record("x")], spec=spec, fraction_seed=3)
