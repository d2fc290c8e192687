"""Two processes train like one; they resume exactly; they agree on the steps that can't be used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_training import exact_scalars

from covft.engine import setup_distributed
from covft.engine.scalars_hook import read_scalars


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    script = Path(__file__).with_name("ddp_server.py")
    run = subprocess.run(
        [sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


def weights_of(folder):
    return load_file(folder / "weights.safetensors")


def test_two_processes_equal_one(folder):
    one, two = weights_of(folder / "one"), weights_of(folder / "two")
    for name in one:
        if name != "calls":
            torch.testing.assert_close(two[name], one[name], rtol=1e-12, atol=1e-12)
    logs = [read_scalars(folder / name / "scalars.jsonl") for name in ("one", "two")]
    for ours, theirs in zip(*logs, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-12)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-12)


def test_two_processes_resume_exactly(folder):
    assert exact_scalars(folder / "cut") == exact_scalars(folder / "whole")
    whole, cut = weights_of(folder / "whole"), weights_of(folder / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert "resuming from" in (folder / "cut/train.log").read_text()


def test_processes_agree_to_skip_a_step(folder):
    records = read_scalars(folder / "silent/scalars.jsonl")
    skipped = [record["step"] for record in records if record["loss"] is None]
    assert 0 < len(skipped) < len(records) == 12


def test_launchers_that_make_no_sense_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="did you mean 'pytorch'"):
        setup_distributed("torch")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=r"environment variables RANK.*torchrun"):
        setup_distributed("pytorch")


def test_slurm_environment_is_translated(monkeypatch):
    joined = []
    monkeypatch.setattr(torch.distributed, "init_process_group", joined.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "to be replaced")
    slurm = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
    for name, value in {**slurm, "MASTER_ADDR": "node-1"}.items():
        monkeypatch.setenv(name, value)
    setup_distributed("slurm")
    assert [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["5", "1", "8"]
    assert joined == ["gloo"]
