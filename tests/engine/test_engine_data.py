"""The dataloader of a run, with the real sampler."""

import pytest
import torch
from mmengine.hooks import Hook
from toy_training import ToyDataset, collate, exact_scalars, toy_runner

from covft.engine import build_dataloader

torch.set_num_threads(1)


class MeasuredDataset(ToyDataset):
    def lengths(self):
        return [3 + index % 5 for index in range(self.size)]

    def has_image(self, index):
        return index % 3 > 0


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
