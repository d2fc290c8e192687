"""Checkpoints between engines and numbers of processes; previews; steps that one process spoils."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from forks import run_script
from mmengine.config import Config
from parallel_case import build_model, weights_of

from covft.checkpoints.run import load_start
from covft.checkpoints.trainable import load_weights
from covft.engine.checkpoint_files import find_checkpoints, read_checkpoint
from covft.engine.scalars_hook import read_scalars


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    run_script(Path(__file__).with_name("parallel_checkpoints.py"), folder)
    return folder


def assert_same(one, other):
    for ours, theirs in zip(
        read_scalars(one / "scalars.jsonl")[-2:],
        read_scalars(other / "scalars.jsonl")[-2:],
        strict=True,
    ):
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-12)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-12)
    ours, theirs = weights_of(one), weights_of(other)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_whole_checkpoints_are_alike(folder):
    ours, theirs = (read_checkpoint(folder / name / "iter_2.pth") for name in ("fsdp2", "ddp"))
    assert ours["meta"]["strategy"] == "fsdp2"
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    assert ours["optimizer"]["state"].keys() == theirs["optimizer"]["state"].keys()
    for index, entries in theirs["optimizer"]["state"].items():
        for entry, value in entries.items():
            torch.testing.assert_close(
                ours["optimizer"]["state"][index][entry], value, rtol=1e-9, atol=1e-12
            )


@pytest.mark.parametrize("name", ["fsdp2_to_ddp", "ddp_to_fsdp2"])
def test_another_strategy_resumes_a_whole_checkpoint(folder, name):
    assert "resuming from" in (folder / name / "train.log").read_text()
    assert_same(folder / name, folder / "ddp")


@pytest.mark.parametrize(("name", "origin"), [("one", "shards"), ("single", "ddp")])
def test_another_number_of_processes_resumes(folder, name, origin):
    log = (folder / name / "train.log").read_text()
    assert "written by 2 processes and is resumed by 1" in log
    assert_same(folder / name, folder / origin)


def test_another_strategy_does_not_read_shards(folder):
    message = (folder / "shards_to_ddp.txt").read_text()
    assert "iter_2 holds shards of strategy 'fsdp2', this run uses 'ddp'" in message
    assert "resume with --strategy fsdp2" in message


def test_replicas_are_not_sharded(folder):
    message = (folder / "sharded_ddp.txt").read_text()
    assert "checkpoint.sharded=True: strategy 'ddp' keeps the model whole" in message


def test_a_model_takes_its_weights_from_shards(folder):
    model = build_model("float64")
    names = load_weights(model, folder / "shards/iter_4")
    final = weights_of(folder / "shards")
    assert names == sorted(final)
    started = build_model("float64")
    load_start(started, Config({"load_from": str(folder / "shards/iter_4")}))
    for state in (model.state_dict(), started.state_dict()):
        assert all(torch.equal(state[name], value) for name, value in final.items())


def test_shards_of_another_engine_are_explained(folder, tmp_path):
    shutil.copytree(folder / "shards/iter_2", tmp_path / "iter_2")
    (tmp_path / "iter_2/shards/.metadata").unlink()
    with pytest.raises(ValueError, match=r"shards of strategy 'fsdp2', which that alone can read"):
        load_weights(build_model("float64"), tmp_path / "iter_2")


def test_torn_shards_are_found(folder, tmp_path):
    shutil.copytree(folder / "shards", tmp_path / "run")
    shard = tmp_path / "run/iter_4/shards/__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:100])
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["iter_4", "iter_2"]
    with pytest.raises(
        ValueError, match=r"1 of its 3 shard files are missing or torn, such as __1"
    ):
        read_checkpoint(tmp_path / "run/iter_4")


def test_a_sharded_model_generates(folder):
    (text,) = json.loads((folder / "answer.json").read_text())
    log = (folder / "shards/train.log").read_text()
    assert f"generations after 0 steps:\n    {text}\n" in log


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_step_that_one_process_spoils_is_skipped_by_all(folder, name):
    records = read_scalars(folder / f"bad_{name}/scalars.jsonl")
    assert [record.get("skipped") for record in records] == [
        None,
        "non-finite loss or gradient",
        None,
    ]
    assert all(value.isfinite().all() for value in weights_of(folder / f"bad_{name}").values())
