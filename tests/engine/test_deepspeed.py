"""DeepSpeed's ZeRO: like one process, resumed bit for bit; what a config may ask of it."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forks import run_script
from parallel_case import (
    assert_like_one_process,
    assert_resumed_bitwise,
    build_model,
    weights_of,
)
from torch import nn

from covft.engine.scalars_hook import read_scalars
from covft.engine.strategies import ZeRO2Strategy, ZeRO3Strategy, chosen_strategy
from covft.engine.strategies.deepspeed_config import (
    check_comm_dtype,
    check_parameters,
    engine_config,
    linear_classes,
)
from covft.models.lm_loss import OutputLayer

SCRIPT = Path(__file__).with_name("deepspeed_cases.py")
STAGE = {"optim_wrapper": {"optimizer": {"type": "AdamW", "lr": 1e-3}}}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed isn't installed"
)
both_stages = pytest.mark.parametrize("name", ["zero2", "zero3"])


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    run_script(SCRIPT, "engines", folder)
    return folder


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    run_script(SCRIPT, "variants", folder)
    return folder


@needs_deepspeed
@both_stages
def test_two_processes_train_like_one(engines, name):
    assert_like_one_process(engines / name / "whole", engines / "one", rel=1e-6)


@needs_deepspeed
@both_stages
def test_a_resumed_run_is_the_uninterrupted_one(engines, name):
    assert_resumed_bitwise(engines / name)
    shards = engines / name / "whole/iter_12/shards/zero"
    assert len(list(shards.glob("*_optim_states.pt"))) == 2


@needs_deepspeed
@pytest.mark.slow
@both_stages
def test_offloaded_and_spoiled_steps_are_those_of_one_process(variants, name):
    logs = [read_scalars(path / "scalars.jsonl") for path in (variants / name, variants / "one")]
    skipped = [record.get("skipped") is not None for record in logs[0]]
    assert skipped == [False, True, True, False]
    for ours, theirs in zip(*logs, strict=True):
        for key in ("loss", "grad_norm"):
            expected = theirs[key] and pytest.approx(theirs[key], rel=1e-6)
            assert ours[key] == expected, (ours["step"], key)
    assert [record["loss"] is None for record in logs[0]] == skipped
    assert [record["grad_norm"] is None for record in logs[0]] == [False, False, True, False]
    ours, theirs = weights_of(variants / name), weights_of(variants / "one")
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6, msg=key)


@needs_deepspeed
@pytest.mark.slow
@both_stages
def test_the_model_generates_between_steps(variants, name):
    ours, theirs = (
        [line for line in (path / "train.log").read_text().splitlines() if "said" in line]
        for path in (variants / name, variants / "one")
    )
    assert ours == theirs and len(ours) == 5
    assert len(set(ours)) == 3, "the tower changed in two steps of four"


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3_float32"])
def test_bfloat16_is_that_of_replicas(variants, name):
    logs = [read_scalars(variants / "bf16" / n / "scalars.jsonl") for n in (name, "ddp")]
    for ours, theirs in zip(*logs, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


@needs_deepspeed
@pytest.mark.slow
def test_weights_gathered_in_bfloat16_train_alike(variants):
    logs = [read_scalars(variants / "bf16" / n / "scalars.jsonl") for n in ("zero3", "ddp")]
    losses = [[record["loss"] for record in log] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] != losses[1]


@needs_deepspeed
def test_options_become_deepspeed_config():
    config = engine_config(
        3,
        offload_param="cpu",
        reduce_bucket_size=1000,
        config={"zero_optimization": {"overlap_comm": True, "offload_param": {"pin_memory": True}}},
    )
    assert config["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 1000,
        "overlap_comm": True,
        "offload_param": {"device": "cpu", "pin_memory": True},
    }


@needs_deepspeed
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload_param": "cpu"}, r"offload_param is an option of 'zero3'"),
        ({"offload_optimizer": "cpus"}, r"offload_optimizer 'cpus' is unknown; did you mean 'cpu'"),
        ({"reduce_bucket_size": 0}, r"reduce_bucket_size must be positive, got 0"),
        ({"config": {"bf16": {"enabled": True}}}, r"config\['bf16'\].*optim_wrapper"),
        (
            {"config": {"zero_optimization": {"stage": 3}}},
            r"config.zero_optimization.stage is decided by the strategy \(2\)",
        ),
        (
            {"config": {"zero_optimization": {"overlap_com": True}}},
            r"config.zero_optimization: (?s:.)*overlap_com",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ZeRO2Strategy.check(options, STAGE)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"offload_param": {"device": "cpu"}}, r"offload_param is decided .*offload_param='cpu'"),
        ({"offload_optimizer": {"device": "nvme"}}, r"decided .*strategy.offload_optimizer='cpu'"),
        ({"cpu_offload": True}, r"cpu_offload is decided .*strategy.offload_optimizer='cpu'"),
        ({"zero_quantized_gradients": True}, r"zero_quantized_gradients would round"),
        ({"zero_quantized_weights": True}, r"zero_quantized_weights would round"),
    ],
)
def test_deepspeeds_own_options_do_not_get_around_the_strategys(option, message):
    with pytest.raises(ValueError, match=message):
        engine_config(2, config={"zero_optimization": option})


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="did you mean 'offload_param'"):
        chosen_strategy({"type": "zero3", "offload_params": "cpu"}, "pytorch")


@needs_deepspeed
@pytest.mark.parametrize("kind", ["AdamW8bit", "PagedAdamW8bit", nn.Linear])
def test_optimizers_that_need_whole_parameters_are_refused(kind):
    stage = {"optim_wrapper": {"optimizer": {"type": kind, "lr": 1e-3}}}
    with pytest.raises(ValueError, match=r"can't run under ZeRO.*AdamW.*'fsdp2'"):
        ZeRO3Strategy.check({}, stage)


@needs_deepspeed
def test_other_wrappers_of_the_optimizer_are_refused():
    stage = {"optim_wrapper": {**STAGE["optim_wrapper"], "type": "AmpOptimWrapper"}}
    with pytest.raises(ValueError, match=r"optim_wrapper.type 'AmpOptimWrapper'"):
        ZeRO2Strategy.check({}, stage)
    stage["optim_wrapper"]["type"] = "AutocastOptimWrapper"
    ZeRO2Strategy.check({}, stage)


def test_a_type_of_communication_needs_its_precision():
    with pytest.raises(ValueError, match=r"comm_dtype='bfloat16'.*fp32"):
        check_comm_dtype("bfloat16", "fp32")
    check_comm_dtype("bfloat16", "bf16")
    check_comm_dtype("auto", "fp32")


def test_weights_of_other_types_are_refused():
    model = build_model()
    check_parameters(model, stage=3)
    with pytest.raises(ValueError, match=r"trains float32 weights, but vision\S+ is bfloat16"):
        check_parameters(model.bfloat16(), stage=2)
    model = nn.ModuleList([nn.Linear(2, 2)]).requires_grad_(False)
    model[0].bias = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    check_parameters(model, stage=2)
    with pytest.raises(ValueError, match=r"can't partition quantised weights such as 0.bias"):
        check_parameters(model, stage=3)


def test_layers_that_autocast_runs_are_found_by_their_class():
    class Local(nn.Linear):
        """One that nobody can import."""

    layers = [nn.Linear(1, 1), OutputLayer(1, 1), Local(1, 1), nn.LayerNorm(1), nn.Conv2d(1, 1, 1)]
    assert linear_classes(layers) == [
        "covft.models.lm_loss.OutputLayer",
        "torch.nn.modules.conv.Conv2d",
        "torch.nn.modules.linear.Linear",
    ]


def test_shards_fit_as_many_processes_only(tmp_path):
    (tmp_path / "zero").mkdir()
    for rank in range(4):
        (tmp_path / f"zero/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(ValueError, match=r"written by 4 processes, and there are 1 now.*'fsdp2'"):
        ZeRO2Strategy.load_shards(SimpleNamespace(name="zero2"), tmp_path)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"deepspeed: pip install -e '\.\[train\]'"):
        ZeRO2Strategy.check({}, STAGE)
