"""A real model under every engine of torch: like one process, and resumed bit for bit."""

import pytest
from parallel_case import assert_like_one_process, assert_resumed_bitwise, run_cases

from covft.engine.scalars_hook import read_scalars


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    run_cases(folder, "ddp", "fsdp2", dtype="float64")
    return folder


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_train_like_one(folder, name):
    assert_like_one_process(folder / name / "whole", folder / "one", rel=1e-12)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_resumed_run_is_the_uninterrupted_one(folder, name):
    assert_resumed_bitwise(folder / name)


def test_the_case_is_worth_comparing(folder):
    records = read_scalars(folder / "one/scalars.jsonl")
    assert all(record["grad_norm"] > 0.5 for record in records), "every step is clipped"
    assert all(r["lr/vision"] == pytest.approx(1.5 * r["lr/projector"]) for r in records)
    assert len({record["loss"] for record in records}) == len(records)
    assert (folder / "fsdp2/whole/iter_12/shards/__1_0.distcp").is_file()
    assert (folder / "ddp/whole/iter_12.pth").is_file()
