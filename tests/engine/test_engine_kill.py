"""A run that is killed at random moments, also while it saves, ends like one that isn't."""

import json
from pathlib import Path

import torch
from forks import run_script
from safetensors.torch import load_file
from toy_training import exact_scalars

from covft.engine.checkpoint_files import find_checkpoints, read_checkpoint


def test_killed_and_resumed_run_equals_uninterrupted_one(tmp_path):
    script = Path(__file__).with_name("kill_server.py")
    result = json.loads(run_script(script, tmp_path))
    assert result["kills"] >= 20
    moments = result["moments"]
    assert len(moments) >= 5, "kills while saving"
    assert len(set(moments)) >= 4, moments
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert exact_scalars(cut) == exact_scalars(whole)
    assert len(exact_scalars(whole)) == 120
    ours, theirs = load_file(cut / "weights.safetensors"), load_file(whole / "weights.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not list(cut.glob(".*"))
    assert [path.name for path in find_checkpoints(cut)] == ["iter_120.pth", "iter_118.pth"]
    last = [read_checkpoint(folder / "iter_120.pth") for folder in (cut, whole)]
    assert torch.equal(*(state["random_states"][0]["torch"] for state in last))
    assert last[0]["message_hub"] == last[1]["message_hub"]
