"""Two processes train like one; they resume exactly; they agree on the steps that can't be used."""

import re
from pathlib import Path

import pytest
import torch
from forks import run_script
from parallel_case import weights_of
from toy_training import exact_scalars

from covft.engine.scalars_hook import read_scalars


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    run_script(Path(__file__).with_name("ddp_server.py"), folder)
    return folder


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
    # A step in which only one of the two has a supervised token is done.
    lonely = [r for r in records if r["loss"] is not None and r["tokens"] <= 5]
    assert lonely


def outcomes(folder):
    return [(folder / rank / "outcome").read_text() for rank in "01"]


def test_the_main_process_chooses_where_to_resume(folder):
    assert outcomes(folder / "main_has_less") == ["6", "6"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("main_has_more", "no checkpoint at '.*/1/iter_9.pth': the main process resumes from its"),
        ("another_run", "/1/iter_6.pth is here the checkpoint of another run: the main process"),
    ],
)
def test_no_process_resumes_where_one_cannot(folder, name, message):
    main, second = outcomes(folder / name)
    assert main == f"process 1 can't go on: ValueError: {second}"
    assert re.search(message, second)
    assert "--work-dir on a file system that all nodes share" in second


def test_the_main_process_tells_which_stages_are_finished(folder):
    found = [(folder / "stages" / rank / "finished").read_text() for rank in "01"]
    assert found == ["[True, False]"] * 2
