"""Parameter groups, precision, clipping, schedule."""

import math

import pytest
import torch
from toy_training import ToyModel, toy_runner

from covft.engine import build_optim_wrapper
from covft.engine.optim_wrapper import has_native_bf16
from covft.engine.optimizer import parameter_groups
from covft.engine.schedule import CosineWarmup
from covft.vft import BitFit

torch.set_num_threads(1)
ADAMW = {"type": "AdamW", "lr": 2e-5}


def groups_of(model, **cfg):
    wrapper = build_optim_wrapper(model, {"optimizer": ADAMW, **cfg})
    return {group["name"]: group for group in wrapper.optimizer.param_groups}


def test_longest_prefix_sets_the_learning_rate():
    groups = groups_of(ToyModel(), lr={"vision": 1e-4, "vision.1": 5e-4, "projector": 1e-3})
    names = {name: group["param_names"] for name, group in groups.items()}
    assert names == {
        "vision": ["vision.0.weight", "vision.0.bias"],
        "vision.1": ["vision.1.weight", "vision.1.bias"],
        "projector": ["projector.weight", "projector.bias"],
        "base": ["llm.weight", "llm.bias"],
    }
    rates = {name: group["lr"] for name, group in groups.items()}
    assert rates == {"vision": 1e-4, "vision.1": 5e-4, "projector": 1e-3, "base": 2e-5}


def test_a_prefix_ends_at_a_dot():
    model = ToyModel()
    model.projector_two = torch.nn.Linear(2, 2)
    groups = groups_of(model, lr={"projector": 1e-3})
    assert "projector_two.weight" in groups["base"]["param_names"]


def test_norms_and_biases_do_not_decay():
    optimizer = {**ADAMW, "weight_decay": 0.1}
    groups = groups_of(ToyModel(), optimizer=optimizer, lr={"projector": 1e-3})
    decay = {name: group["weight_decay"] for name, group in groups.items()}
    assert decay == {
        "base": 0.1,
        "base.no_decay": 0.0,
        "projector": 0.1,
        "projector.no_decay": 0.0,
    }
    parameters = dict(ToyModel().named_parameters())
    for name, group in groups.items():
        one_dimensional = {parameters[n].ndim == 1 for n in group["param_names"]}
        assert one_dimensional == {name.endswith("no_decay")}


def test_weight_decay_is_none_unless_asked_for():
    assert groups_of(ToyModel())["base"]["weight_decay"] == 0.0


def test_prefix_that_matches_nothing_is_explained():
    with pytest.raises(ValueError, match=r"starts with 'projektor'; did you mean 'projector'"):
        groups_of(ToyModel(), lr={"projektor": 1e-3})


def test_rate_of_a_frozen_part_is_not_used():
    """The encoder's rate stays in the config when a method freezes the encoder."""
    assert "embed" not in groups_of(ToyModel(), lr={"embed": 1e-3})


def test_model_without_trainable_parameter_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(ToyModel().requires_grad_(False), lr=1.0, prefix_lr={}, weight_decay=0.0)


def test_misspelt_settings_are_explained():
    model = ToyModel()
    with pytest.raises(ValueError, match="did you mean 'AdamW'"):
        build_optim_wrapper(model, {"optimizer": {"type": "AdanW", "lr": 1.0}})
    with pytest.raises(ValueError, match="takes no argument 'beta'; did you mean 'betas'"):
        build_optim_wrapper(model, {"optimizer": {**ADAMW, "beta": 1}})
    with pytest.raises(ValueError, match="takes no argument 'precison'"):
        build_optim_wrapper(model, {"optimizer": ADAMW, "precison": "fp32"})
    with pytest.raises(ValueError, match="precision 'fp23' is unknown; did you mean 'fp32'"):
        build_optim_wrapper(model, {"optimizer": ADAMW, "precision": "fp23"})
    with pytest.raises(ValueError, match="clip_grad must be dict"):
        build_optim_wrapper(model, {"optimizer": ADAMW, "clip_grad": {"norm": 1.0}})
    with pytest.raises(ValueError, match=r"optimizer must be dict\(type=..., lr=...\)"):
        build_optim_wrapper(model, {"precision": "fp32"})


def test_config_is_not_changed_by_building():
    cfg = {"optimizer": dict(ADAMW), "lr": {"vision": 1e-4}, "clip_grad": {"max_norm": 1.0}}
    build_optim_wrapper(ToyModel(), cfg)
    assert cfg == {"optimizer": ADAMW, "lr": {"vision": 1e-4}, "clip_grad": {"max_norm": 1.0}}


def test_fused_kernels_are_used_unless_refused():
    assert groups_of(ToyModel())["base"]["fused"] is True
    refused = groups_of(ToyModel(), optimizer={**ADAMW, "fused": False})
    assert refused["base"]["fused"] is False


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"), [(0, 0, "fp32"), (1, 0, "bf16"), (0, 1, "bf16")]
)
def test_precision_auto_asks_the_cpu(monkeypatch, avx512, amx, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512), raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx), raising=False)
    wrapper = build_optim_wrapper(ToyModel(), {"optimizer": ADAMW})
    assert wrapper.precision == expected


def test_precision_auto_without_the_probes(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert has_native_bf16("cpu") is False


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_precision_sets_the_dtype_of_products(precision, dtype):
    model = ToyModel()
    wrapper = build_optim_wrapper(model, {"optimizer": ADAMW, "precision": precision})
    with wrapper.micro_batch(model, last=True):
        assert model.llm(torch.ones(1, 8)).dtype == dtype
    assert model.llm(torch.ones(1, 8)).dtype == torch.float32


def test_clipping_returns_the_norm_before():
    model = ToyModel()
    wrapper = build_optim_wrapper(model, {"optimizer": ADAMW, "clip_grad": {"max_norm": 0.5}})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert float(wrapper.clip_gradients()) == pytest.approx(math.sqrt(count))
    assert float(wrapper.clip_gradients()) == pytest.approx(0.5, rel=1e-4)


def curve(max_iters, **schedule):
    wrapper = build_optim_wrapper(
        ToyModel(), {"optimizer": {"type": "SGD", "lr": 2.0}, "lr": {"llm": 4.0}}
    )
    scheduler = CosineWarmup(wrapper, max_iters=max_iters, **schedule)
    values = []
    for _ in range(max_iters):
        values.append(wrapper.learning_rates())
        scheduler.step()
    assert [v["llm"] for v in values] == pytest.approx([2 * v["base"] for v in values])
    return [value["base"] for value in values]


def test_curve_is_linear_then_cosine():
    values = curve(7, warmup_iters=3, min_lr_ratio=0.1)
    cosine = [(1 + math.cos(math.pi * s / 4)) / 2 for s in range(4)]
    expected = [0.25, 0.5, 0.75, *(0.1 + 0.9 * c for c in cosine)]
    assert values == pytest.approx([2 * value for value in expected], abs=1e-15)


@pytest.mark.parametrize(("warmup", "first"), [(0, 2.0), (1, 1.0)])
def test_shortest_warmups_start_above_zero_and_reach_the_peak(warmup, first):
    values = curve(5, warmup_iters=warmup)
    assert values[0] == first
    assert values[warmup] == 2.0
    assert 0 < values[-1] < values[-2]


def test_ratio_is_rounded_up_and_fits_the_shortest_run():
    assert curve(40, warmup_ratio=0.03) == curve(40, warmup_iters=2) == curve(40)
    assert curve(1, warmup_ratio=0.5) == [2.0]
    assert curve(3, min_lr_ratio=1.0, warmup_iters=0) == [2.0] * 3


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"warmup_iters": 12}, "warm-up of 12 steps doesn't fit in a run of 12 steps"),
        ({"warmup_iters": -1}, "warm-up of -1 steps"),
        ({"warmup_ratio": 1.0}, r"warmup_ratio must lie in \[0, 1\), got 1.0"),
        ({"warmup_ratio": 0.1, "warmup_iters": 3}, "not both"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio must lie"),
        ({"warmup": 3}, "takes no argument 'warmup'; did you mean 'warmup_"),
        ({"type": "CosineWarmUps"}, "did you mean 'CosineWarmup'"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(tmp_path, schedule, message):
    with pytest.raises(ValueError, match=message):
        toy_runner(tmp_path, param_scheduler={"type": "CosineWarmup", **schedule})


def test_a_methods_own_learning_rate():
    model = ToyModel()
    with pytest.raises(ValueError, match=r"lr\['projector'\] must be a number, or 'method'"):
        groups_of(model, lr={"projector": "method"})
    model.vision.vft = BitFit()
    with pytest.raises(ValueError, match="got 'methd'"):
        groups_of(model, lr={"vision": "methd"})
    assert groups_of(model, lr={"vision": "method"})["vision"]["lr"] == BitFit.learning_rate
