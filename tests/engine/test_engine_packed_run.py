"""A run from the config on: packed, with exact lengths, and from a mixture."""

import pytest
import torch

from covft.config import load_config
from covft.engine.preflight import check_run
from covft.engine.scalars_hook import read_scalars
from covft.engine.train import train

torch.set_num_threads(1)


def losses(folder, options):
    train(load_config("quickstart_covft", options), work_dir=folder)
    records = read_scalars(folder / "finetune" / "scalars.jsonl")
    return [record["loss"] for record in records], [record["tokens"] for record in records]


@pytest.fixture
def options(tiny_options, tmp_path, monkeypatch):
    monkeypatch.setenv("COVFT_CACHE", str(tmp_path / "cache"))
    return {
        **tiny_options,
        "train_cfg.accumulation": 2,
        "train_dataloader.group": "none",
        "evaluation": None,
    }


def mixed(options, **member):
    root = options["train_dataset.root"]
    kept = {key: value for key, value in options.items() if key != "train_dataset.root"}
    dataset = dict(type="EasyVQADataset", root=root, balanced=True, **member)
    mixture = dict(_delete_=True, type="MixtureDataset", datasets={"shapes": dataset})
    return {**kept, "train_dataset": mixture}


def test_packing_and_mixing_change_no_loss(tmp_path, options):
    plain = losses(tmp_path / "plain", options)
    packing = {"train_dataloader.pack": True, "train_dataloader.lengths": "exact"}
    packed = losses(tmp_path / "packed", {**mixed(options), **packing})
    assert packed[1] == plain[1]
    assert packed[0] == pytest.approx(plain[0], rel=2e-6)
    assert (tmp_path / "cache" / "token_lengths").is_dir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_dataloader.lengths": "exact"}, "lengths='exact' has no effect"),
        (
            {"train_dataloader.pack": True, "train_dataloader.group": "length"},
            "no effect with pack",
        ),
    ],
)
def test_loaders_that_cannot_be_are_found_before_training(options, change, message):
    with pytest.raises(ValueError, match=message):
        check_run(load_config("quickstart_covft", {**options, **change}))


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ({"weight": -1}, "shapes.weight must be a positive number"),
        ({"resize": "pad"}, "shapes: it makes images square by 'pad', the mixture by None"),
        ({"max_turn": 3}, "shapes: .*did you mean 'max_turns'"),
    ],
)
def test_members_that_cannot_be_are_found_before_training(options, member, message):
    with pytest.raises(ValueError, match=message):
        check_run(load_config("quickstart_covft", mixed(options, **member)))
