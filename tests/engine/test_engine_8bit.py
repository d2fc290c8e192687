"""Training in little memory: optimizers with moments in 8 bits, and whole runs of QLoRA."""

import sys

import pytest
import torch
from mmengine.hooks import Hook
from safetensors.torch import load_file
from toy_training import ToyModel, toy_runner

from covft.checkpoints import load_run
from covft.config import load_config
from covft.engine import build_optim_wrapper
from covft.engine.checkpoint_files import read_checkpoint
from covft.engine.scalars_hook import read_scalars
from covft.engine.train import train
from covft.registry import LLMS

torch.set_num_threads(1)
EVERY_3 = {"type": "CheckpointHook", "interval": 3, "max_keep": 3}
KINDS = ("AdamW8bit", "PagedAdamW8bit")


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes isn't installed: pip install 'covft[train]'"
    )


def eight_bit(kind, **options):
    return {"type": kind, "lr": 1e-2, "min_8bit_size": 16, **options}


class StopAt(Hook):
    def __init__(self, step):
        self.step = step

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if batch_idx + 1 == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", KINDS)
def test_groups_rates_and_states(bitsandbytes, kind):
    cfg = {"optimizer": eight_bit(kind, weight_decay=0.1), "lr": {"vision": 1e-4}}
    model = ToyModel()
    wrapper = build_optim_wrapper(model, cfg)
    optimizer = wrapper.optimizer
    assert type(optimizer) is getattr(bitsandbytes.optim, kind)
    groups = {g["name"]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert groups == {
        "vision": (1e-4, 0.1),
        "vision.no_decay": (1e-4, 0.0),
        "base": (1e-2, 0.1),
        "base.no_decay": (1e-2, 0.0),
    }
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter, state in optimizer.state.items():
        eight = parameter.numel() >= 16
        assert state["state1"].dtype == (torch.uint8 if eight else torch.float32)


def test_small_parameters_keep_float32_moments_by_default(bitsandbytes):
    wrapper = build_optim_wrapper(ToyModel(), {"optimizer": {"type": "AdamW8bit", "lr": 1e-2}})
    assert wrapper.optimizer.args.min_8bit_size == 4096
    assert all(group["weight_decay"] == 0 for group in wrapper.optimizer.param_groups)


def test_steps_are_about_those_of_adamw(bitsandbytes):
    moved = {}
    for kind, options in (("AdamW", {}), ("AdamW8bit", {"min_8bit_size": 16})):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.zeros(64, 64))
        model = torch.nn.ParameterDict({"weight": parameter})
        optimizer = build_optim_wrapper(
            model, {"optimizer": {"type": kind, "lr": 1e-3, **options}}
        ).optimizer
        for _ in range(10):
            parameter.grad = torch.randn(64, 64)
            optimizer.step()
        moved[kind] = parameter.detach()
    exact, rounded = moved["AdamW"], moved["AdamW8bit"]
    error = (rounded - exact).norm() / exact.norm()
    assert 0 < error < 0.05


def exact(work_dir):
    keys = ("step", "loss", "grad_norm", "lr/vision", "lr/base")
    return [[record[key] for key in keys] for record in read_scalars(work_dir / "scalars.jsonl")]


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_equals_uninterrupted_one_bit_for_bit(bitsandbytes, tmp_path, kind):
    wrapper = {"optimizer": eight_bit(kind), "lr": {"vision": 1e-3}}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    toy_runner(whole, optim_wrapper=wrapper, hooks=[EVERY_3]).train()
    with pytest.raises(KeyboardInterrupt):
        toy_runner(cut, optim_wrapper=wrapper, hooks=[EVERY_3, StopAt(8)]).train()
    saved = read_checkpoint(cut / "iter_6.pth")["optimizer"]["state"]
    moments = [s["__bnb_optimizer_quant_state__"]["state1"] for s in saved.values()]
    assert torch.uint8 in {moment.dtype for moment in moments}
    torch.manual_seed(99)
    resumed = toy_runner(cut, optim_wrapper=wrapper, hooks=[EVERY_3], resume=True)
    assert resumed.iter == 6
    restored = resumed.optim_wrapper.optimizer.state_dict()["state"]
    assert restored.keys() == saved.keys()
    for index, state in saved.items():
        for name, value in state["__bnb_optimizer_quant_state__"].items():
            assert torch.equal(value, restored[index]["__bnb_optimizer_quant_state__"][name])
    resumed.train()
    assert exact(whole) == exact(cut)
    ours, theirs = (load_file(folder / "weights.safetensors") for folder in (whole, cut))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("kind", KINDS)
def test_missing_package_is_named(monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=rf"'{kind}' needs .*pip install bitsandbytes"):
        build_optim_wrapper(ToyModel(), {"optimizer": eight_bit(kind)})


def test_misspelt_settings_are_explained():
    with pytest.raises(ValueError, match="did you mean 'AdamW8bit'"):
        build_optim_wrapper(ToyModel(), {"optimizer": eight_bit("AdamW8bits")})
    with pytest.raises(ValueError, match="takes no argument 'beta'; did you mean 'betas'"):
        build_optim_wrapper(ToyModel(), {"optimizer": eight_bit("AdamW8bit", beta=1)})


@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora_8bit"])
def test_whole_run_with_low_rank_updates(tiny_options, tmp_path, request, quantized):
    options = {
        **tiny_options,
        "model.llm.freeze_embeddings": False,
        "model.llm.lora": dict(rank=4, alpha=8),
        "stages.pretrain.model.llm.lora": None,
        "evaluation": None,
    }
    if quantized:
        request.getfixturevalue("bitsandbytes")
        optimizer = dict(type="AdamW8bit", lr=1e-3, min_8bit_size=16)
        options |= {
            "model.llm.quantization": "nf4",
            "optim_wrapper.optimizer": dict(_delete_=True, **optimizer),
        }
    train(load_config("quickstart_covft", options), work_dir=tmp_path / "run")
    saved = load_file(tmp_path / "run/finetune/weights.safetensors")
    updates = [name for name in saved if name.startswith("llm.")]
    # Two of each of seven layers in two blocks.
    assert len(updates) == 28 and all(".lora_" in name for name in updates)
    assert any(saved[name].abs().sum() > 0 for name in updates if name.endswith("lora_b"))
    model = load_run(tmp_path / "run").model
    own = model.state_dict()
    assert all(torch.equal(value, own[name].cpu()) for name, value in saved.items())
    plain = load_config("quickstart_covft", {**tiny_options}).model.llm
    assert model.llm.merged_state_dict().keys() == build_plain(plain).state_dict().keys()


def build_plain(cfg):
    return LLMS.build(cfg).model
