"""Which strategy a run gets, and what is refused before anything is built."""

import pytest
import torch

from covft.config import load_config, stage_configs, stage_text
from covft.engine.preflight import check_run
from covft.engine.strategies import NAMES, chosen_strategy, named_strategy, use_strategy
from covft.engine.strategies import fsdp2 as fsdp2_module
from covft.engine.strategies.fsdp2 import FSDP2Strategy, mixed_precision


def checked(options, tiny_options, *, launcher=None):
    check_run(load_config("quickstart_covft", {**tiny_options, **options}), launcher=launcher)


def test_the_launcher_decides_where_the_config_does_not():
    assert chosen_strategy(None, "none") == {"type": "single"}
    assert chosen_strategy({}, "slurm") == {"type": "ddp"}
    assert chosen_strategy({"type": "fsdp2"}, "pytorch") == {"type": "fsdp2"}


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_several_processes_need_a_launcher(name):
    with pytest.raises(ValueError, match=rf"'{name}' takes several processes.*dist_train\.sh"):
        chosen_strategy({"type": name}, "none")


def test_one_process_alone_needs_none():
    with pytest.raises(ValueError, match="one process alone, but launcher 'pytorch'"):
        chosen_strategy({"type": "single"}, "pytorch")


@pytest.mark.parametrize("name", NAMES)
def test_names_are_those_of_configs(name):
    assert named_strategy(name) == {"type": name}


def test_xtuners_names():
    assert named_strategy("deepspeed_zero3") == {"type": "zero3"}
    offload = named_strategy("deepspeed_zero2_offload")
    assert offload == {"type": "zero2", "offload_optimizer": "cpu"}
    with pytest.raises(ValueError, match="'deepspeed_zero1' is unknown; did you mean"):
        named_strategy("deepspeed_zero1")


def test_a_name_on_the_command_line_holds_in_all_stages(tiny_options):
    own = {"strategy": {"type": "fsdp2", "reshard_after_forward": False}}
    options = {**tiny_options, **own, "stages.pretrain.strategy": {"type": "ddp"}}
    cfg = load_config("quickstart_covft", options)
    before = [stage_text(stage, seed=0) for _, stage in stage_configs(cfg)]
    use_strategy(cfg, "fsdp2")
    strategies = [stage.strategy for _, stage in stage_configs(cfg)]
    assert strategies[1] == own["strategy"]
    assert strategies[0]["type"] == "fsdp2"
    assert [stage_text(stage, seed=0) for _, stage in stage_configs(cfg)] == before
    use_strategy(cfg, "ddp")
    assert [stage.strategy for _, stage in stage_configs(cfg)] == [{"type": "ddp"}] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": {"type": "fsdp"}}, "'fsdp' is not a strategy; did you mean"),
        ({"strategy": {"type": "fsdp2", "offload": True}}, "no option 'offload'; did you mean"),
        ({"strategy": {"type": "ddp", "static": True}}, "no option 'static'|no argument 'static'"),
        ({"strategy": {"type": "FSDPStrategy"}}, "'FSDPStrategy' is not one of ddp, fsdp2"),
        ({"strategy": {"type": "fsdp2", "param_dtype": "bf16"}}, r"strategy\.param_dtype 'bf16'"),
        ({"strategy": {"type": "fsdp2", "param_dtype": "bfloat16"}}, "needs a GPU and"),
        ({"strategy": {"type": "fsdp2", "cpu_offload": True}}, "no effect without a GPU"),
        (
            {"strategy": {"type": "fsdp2"}, "optim_wrapper.optimizer.type": "AdamW8bit"},
            "of which 'AdamW8bit' is none: use AdamW",
        ),
        (
            {
                "strategy": {"type": "fsdp2"},
                "model.llm.quantization": "nf4",
                "model.llm.lora": {"rank": 2, "alpha": 4},
                "model.llm.freeze_embeddings": False,
            },
            "4-bit weights",
        ),
        ({"strategy": {"type": "ddp"}, "checkpoint.sharded": True}, "keeps the model whole"),
    ],
)
def test_what_does_not_go_together_is_found_first(tiny_options, options, message):
    with pytest.raises(ValueError, match=message):
        checked(options, tiny_options)


def test_a_strategy_named_by_its_class_keeps_its_options(tiny_options):
    own = {"strategy": {"type": FSDP2Strategy, "reshard_after_forward": False}}
    cfg = load_config("quickstart_covft", {**tiny_options, **own})
    use_strategy(cfg, "fsdp2")
    assert cfg.strategy == {"type": "fsdp2", "reshard_after_forward": False}


@pytest.mark.parametrize(
    ("key", "message"),
    [("optim_wrapper.optimizer", r"optim_wrapper\.optimizer must be"), ("model.llm", "model.llm")],
)
def test_a_missing_part_is_told_by_the_check_of_it(tiny_options, key, message):
    cfg = load_config("quickstart_covft", {**tiny_options, "strategy": {"type": "fsdp2"}})
    part, name = key.split(".")
    for owner in (cfg, *cfg.stages.values()):
        (owner.get(part) or {}).pop(name, None)
    with pytest.raises(ValueError, match=message):
        check_run(cfg)


def test_launcher_and_strategy_are_compared_if_both_are_known(tiny_options):
    options = {"strategy": {"type": "fsdp2"}}
    checked(options, tiny_options)
    checked(options, tiny_options, launcher="slurm")
    with pytest.raises(ValueError, match="takes several processes"):
        checked(options, tiny_options, launcher="none")
    with pytest.raises(ValueError, match=r"checkpoint\.sharded=True: strategy 'single'"):
        checked({"checkpoint.sharded": True}, tiny_options, launcher="none")


def test_types_of_gathered_weights_and_gradients():
    policy = mixed_precision("auto", "auto", casts=True, exact=False)
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert not policy.cast_forward_inputs
    policy = mixed_precision("auto", "auto", casts=False, exact=False)
    assert (policy.param_dtype, policy.reduce_dtype) == (None, torch.float32)
    policy = mixed_precision("auto", "auto", casts=True, exact=True)
    assert (policy.param_dtype, policy.reduce_dtype) == (None, None)
    policy = mixed_precision("float32", "bfloat16", casts=True, exact=False)
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.float32, torch.bfloat16)


def test_what_a_gpu_allows(monkeypatch, tiny_options):
    monkeypatch.setattr(fsdp2_module, "best_device", lambda: "cuda")
    (_, stage), *_ = stage_configs(load_config("quickstart_covft", tiny_options))
    stage.optim_wrapper["precision"] = "bf16"
    FSDP2Strategy.check({"param_dtype": "bfloat16", "cpu_offload": True}, stage)
    stage.optim_wrapper["precision"] = "fp32"
    with pytest.raises(ValueError, match=r"precision='bf16' \(it is 'fp32', on cuda\)"):
        FSDP2Strategy.check({"param_dtype": "bfloat16"}, stage)
