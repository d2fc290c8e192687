"""The dataloader of a run, with the real sampler."""

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from toy_training import ToyDataset, collate, exact_scalars, toy_runner

from covft.datasets import CostModel, Sizes
from covft.engine import build_dataloader, data
from covft.engine.data import check_dataloader

torch.set_num_threads(1)


class MeasuredDataset(ToyDataset):
    def lengths(self):
        return [3 + index % 5 for index in range(self.size)]

    def sizes(self):
        return Sizes(np.array(self.lengths()), self.has_images().astype(int))

    def exact_sizes(self, **work):
        assert work == {"num_workers": 0, "rank": 0, "world_size": 1}
        return Sizes(np.arange(self.size), np.zeros(self.size))

    def has_images(self):
        return np.arange(self.size) % 3 > 0


def loader(**settings):
    return build_dataloader(
        MeasuredDataset(), collate, batch_size=2, accumulation=2, seed=4, **settings
    )


class StopAt(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if batch_idx + 1 == 8:
            raise KeyboardInterrupt


@pytest.mark.parametrize("group", ["none", "length", "modality_length"])
def test_resume_through_the_real_sampler_is_exact(tmp_path, group):
    every_3 = {"type": "CheckpointHook", "interval": 3}
    toy_runner(tmp_path / "whole", dataloader=loader(group=group), hooks=[every_3]).train()
    with pytest.raises(KeyboardInterrupt):
        runner = toy_runner(
            tmp_path / "cut", dataloader=loader(group=group), hooks=[every_3, StopAt()]
        )
        runner.train()
    toy_runner(tmp_path / "cut", dataloader=loader(group=group), resume=True).train()
    assert exact_scalars(tmp_path / "cut") == exact_scalars(tmp_path / "whole")


def names(dataloader, count=4):
    batches = iter(dataloader)
    return [next(batches)["sample_ids"] for _ in range(count)]


def test_settings_reach_the_sampler():
    assert names(loader(shuffle=False), 2) == [["s0", "s1"], ["s2", "s3"]]
    assert names(loader()) != names(loader(shuffle=False))
    assert names(loader()) == names(loader(num_workers=2))
    by_modality = loader(group="modality_length")
    step = [name for batch in names(by_modality, 2) for name in batch]
    assert len({int(name[1:]) % 3 > 0 for name in step}) == 1


def test_next_epoch_follows_without_a_pause(tmp_path):
    runner = toy_runner(
        tmp_path, max_iters=None, dataloader=loader(), train_cfg={"max_epochs": 1.5}
    )
    assert (runner.max_iters, runner.max_epochs) == (15, 2)
    runner.train()
    assert runner.epoch == 1


def test_packed_micro_batches_hold_a_steps_samples():
    plain, packed = loader(), loader(pack=True)
    for first in range(0, 8, 2):
        steps = [
            [i for b in names(one, 8)[first : first + 2] for i in b] for one in (plain, packed)
        ]
        assert sorted(steps[0]) == sorted(steps[1])
    assert names(packed, 8) != names(plain, 8)


def test_costs_decide_how_it_is_packed():
    def costs(**settings):
        return loader(pack=True, **settings).batch_sampler._costs.tolist()

    dataset = MeasuredDataset()
    assert costs() == dataset.lengths()
    tiles = costs(cost=CostModel(per_square=100.0))
    assert tiles == (np.array(dataset.lengths()) + 100 * dataset.has_images()).tolist()
    assert costs(lengths="exact") == [1, *range(1, 40)]


def test_processes_plan_by_the_first_ones_exact_lengths(monkeypatch):
    def first_ones(tensor, src):
        assert src == 0 and tensor[0].tolist() == list(range(40))
        tensor[0, 3] = 7  # where this process could open no image

    monkeypatch.setattr(data, "broadcast", first_ones)
    costs = loader(pack=True, lengths="exact").batch_sampler._costs.tolist()
    assert costs == [1, 1, 2, 7, *range(4, 40)]


def test_exact_lengths_serve_grouping_too():
    by_length = loader(group="length", lengths="exact", shuffle=False)
    assert names(by_length, 2) == [["s3", "s2"], ["s1", "s0"]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": "exact"}, "lengths='exact' has no effect without pack=True or a group"),
        ({"lengths": "guessed"}, "lengths must be estimated or exact, got 'guessed'"),
        ({"pack": True, "group": "length"}, "group='length' has no effect with pack=True"),
    ],
)
def test_settings_that_would_have_no_effect(settings, message):
    with pytest.raises(ValueError, match=message):
        loader(**settings)
    with pytest.raises(ValueError, match=message):
        check_dataloader(batch_size=2, **settings)


def test_a_cost_without_packing_has_no_effect():
    with pytest.raises(ValueError, match="cost has no effect without pack=True"):
        loader(cost=CostModel())
