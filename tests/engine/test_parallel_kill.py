"""A sharded run whose processes are killed while they save ends like one that isn't."""

import json
from pathlib import Path

import torch
from forks import run_script
from parallel_case import weights_of
from toy_training import exact_scalars

from covft.engine.checkpoint_files import find_checkpoints


def test_killed_sharded_saves_lose_nothing(tmp_path):
    script = Path(__file__).with_name("sharded_kill_server.py")
    left = json.loads(run_script(script, tmp_path).splitlines()[-1])
    two, four, six, eight = ("iter_2", "iter_4", "iter_6", "iter_8")
    assert left == [
        [],
        [],
        [two],
        [two],
        [two, four],
        [two, four, six],
        [two, six, eight],
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert [path.name for path in find_checkpoints(cut)] == ["iter_10", "iter_8"]
    assert not list(cut.glob(".*"))
    assert exact_scalars(cut) == exact_scalars(whole)
    ours, theirs = weights_of(cut), weights_of(whole)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
