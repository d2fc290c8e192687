import itertools
from collections import Counter

import numpy as np
import pytest

from covft.datasets import StepBatchSampler

RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(10, 500, 103).tolist()
HAS_IMAGE = (RNG.random(103) < 0.6).tolist()


def sampler_of(lengths=LENGTHS, **arguments):
    arguments = {"batch_size": 4, "has_image": HAS_IMAGE[: len(lengths)], **arguments}
    return StepBatchSampler(lengths, **arguments)


def take(sampler, count):
    return list(itertools.islice(sampler, count))


@pytest.mark.parametrize("group", ["none", "length", "modality_length"])
def test_every_sample_once_an_epoch(group):
    sampler = sampler_of(group=group)
    seen = [i for batch in take(sampler, 103) for i in batch]
    # 103 micro-batches of 4 are 4 epochs; steps don't end where epochs do.
    assert Counter(seen) == dict.fromkeys(range(103), 4)
    whole_steps = 25
    first = [i for batch in take(sampler, whole_steps) for i in batch]
    assert len(set(first)) == 100


@pytest.mark.parametrize("group", ["none", "length", "modality_length"])
def test_steps_do_not_depend_on_how_they_are_split(group):
    splits = [(16, 1, 1), (4, 4, 1), (1, 16, 1), (2, 2, 4), (4, 1, 4), (1, 1, 16)]
    streams = []
    for batch_size, accumulation, world_size in splits:
        ranks = [
            take(
                sampler_of(
                    batch_size=batch_size,
                    accumulation=accumulation,
                    rank=rank,
                    world_size=world_size,
                    group=group,
                ),
                20 * accumulation,
            )
            for rank in range(world_size)
        ]
        assert all(len(batch) == batch_size for batches in ranks for batch in batches)
        streams.append(
            [
                sorted(
                    i
                    for batches in ranks
                    for batch in batches[step * accumulation : (step + 1) * accumulation]
                    for i in batch
                )
                for step in range(20)
            ]
        )
    assert all(stream == streams[0] for stream in streams[1:])


@pytest.mark.parametrize("group", ["none", "length", "modality_length"])
def test_a_run_can_begin_at_any_step(group):
    whole = take(sampler_of(accumulation=2, group=group), 80)
    for start in (0, 1, 7, 12, 13, 30):
        resumed = sampler_of(accumulation=2, group=group)
        resumed.start_step = start
        assert take(resumed, 80 - 2 * start) == whole[2 * start :]


def test_a_late_start_costs_no_replay(monkeypatch):
    sampler = sampler_of()
    calls = []
    order = sampler._order
    monkeypatch.setattr(sampler, "_order", lambda epoch: calls.append(epoch) or order(epoch))
    sampler.start_step = 10**9
    next(iter(sampler))
    assert len(calls) <= 2


def test_seed_and_epoch_change_the_order():
    first = take(sampler_of(), 25)
    assert take(sampler_of(), 25) == first
    assert take(sampler_of(seed=1), 25) != first
    sampler = sampler_of(LENGTHS[:100])
    epochs = take(sampler, 50)
    assert epochs[:25] != epochs[25:]
    assert sorted(itertools.chain(*epochs[:25])) == sorted(itertools.chain(*epochs[25:]))


def test_without_shuffling_samples_come_in_order():
    batches = take(sampler_of(LENGTHS[:10], shuffle=False), 5)
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1], [2, 3, 4, 5], [6, 7, 8, 9]]


def test_micro_batches_hold_similar_lengths():
    def spread(group):
        batches = take(sampler_of(accumulation=8, group=group), 200)
        return np.mean([np.ptp([LENGTHS[i] for i in batch]) for batch in batches])

    assert spread("length") < spread("none") / 3


def test_ranks_have_similar_lengths_at_the_same_time():
    # A rank with the longer samples would keep the others waiting at every micro-batch.
    ranks = [
        take(sampler_of(accumulation=4, rank=rank, world_size=2, group="length"), 40)
        for rank in range(2)
    ]
    longest = [[max(LENGTHS[i] for i in batch) for batch in batches] for batches in ranks]
    gap = np.mean(np.abs(np.subtract(*longest)))
    assert gap < np.ptp(LENGTHS) / 5


def mixed_steps(sampler, steps):
    kinds = [{HAS_IMAGE[i] for i in sampler.step(step)} for step in range(steps)]
    return sum(len(kind) == 2 for kind in kinds)


def test_steps_hold_one_modality_but_for_leftovers():
    sampler = sampler_of(group="modality_length")
    # 26 steps an epoch: at most one for the rest and one across the border are mixed, in each of
    # many epochs, however the borders fall.
    assert mixed_steps(sampler, 260) <= 20
    assert mixed_steps(sampler_of(group="length"), 260) > 200


def test_modalities_alternate_at_random():
    sampler = sampler_of(group="modality_length")
    kinds = [HAS_IMAGE[sampler.step(step)[0]] for step in range(24)]
    assert 4 < sum(one != other for one, other in itertools.pairwise(kinds)) < 20


@pytest.mark.parametrize("group", ["none", "length", "modality_length"])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_data_sets_smaller_than_a_step(group, count):
    sampler = sampler_of(LENGTHS[:count], group=group, accumulation=2)
    assert sampler.steps_per_epoch == (2 if count == 9 else 1)
    seen = Counter(i for batch in take(sampler, 2 * count) for i in batch)
    assert seen == dict.fromkeys(range(count), 8)


@pytest.mark.parametrize("has_image", [[True] * 50, [False] * 50])
def test_a_single_modality(has_image):
    sampler = sampler_of(LENGTHS[:50], has_image=has_image, group="modality_length")
    seen = Counter(i for batch in take(sampler, 50) for i in batch)
    assert seen == dict.fromkeys(range(50), 4)


def test_steps_per_epoch():
    assert sampler_of().steps_per_epoch == 26
    assert sampler_of(accumulation=2, world_size=4).steps_per_epoch == 4
    assert sampler_of(LENGTHS[:100]).steps_per_epoch == 25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"accumulation": 0}, "accumulation must be positive"),
        ({"rank": 2, "world_size": 2}, r"rank must be in 0..1, got 2"),
        ({"group": "modality"}, "group must be one of none, length, modality_length"),
        ({"group": "modality_length", "has_image": None}, "needs has_image"),
        ({"group": "modality_length", "has_image": [True]}, "has_image of 1"),
        ({"lengths": []}, "number of samples must be positive"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        sampler_of(**arguments)


def packed_ranks(steps=10, *, world_size=2, group="none", **arguments):
    shared = {"accumulation": 2, "world_size": world_size, "costs": LENGTHS, "group": group}
    return [
        take(sampler_of(rank=rank, **shared, **arguments), 2 * steps) for rank in range(world_size)
    ]


@pytest.mark.parametrize("group", ["none", "modality_length"])
def test_packed_steps_hold_the_samples_of_unpacked_ones(group):
    plain = sampler_of(accumulation=2, world_size=2, group=group)
    ranks = packed_ranks(group=group)
    for step in range(10):
        packed = [
            i for batches in ranks for batch in batches[2 * step : 2 * step + 2] for i in batch
        ]
        assert sorted(packed) == sorted(plain.step(step))
    assert all(batch for batches in ranks for batch in batches)
    assert {len(batch) for batches in ranks for batch in batches} > {4}


def test_packed_ranks_have_about_the_same_to_do_at_the_same_time():
    loads = np.array(
        [[sum(LENGTHS[i] for i in batch) for batch in batches] for batches in packed_ranks()]
    )
    assert (loads.max(0) / loads.mean(0)).mean() < 1.02
    assert (loads[:, ::2].max(0) >= loads[:, 1::2].max(0)).all()  # the dearest comes first
    plain = np.array(
        [
            [
                sum(LENGTHS[i] for i in batch)
                for batch in take(sampler_of(accumulation=2, world_size=2, rank=rank), 20)
            ]
            for rank in range(2)
        ]
    )
    assert (plain.max(0) / plain.mean(0)).mean() > 1.1


def test_a_packed_run_can_begin_at_any_step():
    whole = packed_ranks(20, world_size=1)[0]
    for start in (1, 7, 13):
        resumed = sampler_of(accumulation=2, costs=LENGTHS)
        resumed.start_step = start
        assert take(resumed, 40 - 2 * start) == whole[2 * start :]


def test_packing_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="group='length' has no effect"):
        sampler_of(group="length", costs=LENGTHS)
    with pytest.raises(ValueError, match="103 lengths, but costs of 1 samples"):
        sampler_of(costs=[1])
