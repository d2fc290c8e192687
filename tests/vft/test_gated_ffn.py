from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

from covft.models.vision.vit import MLP, ViTConfig
from covft.vft import gated_ffn as module
from covft.vft.experts import WideExperts
from covft.vft.gated_ffn import act_name, gated_ffn

ACTS = {
    "quick_gelu": ACT2FN["quick_gelu"],
    "gelu": ACT2FN["gelu"],
    "gelu_tanh": ACT2FN["gelu_pytorch_tanh"],
}
NAMES = ("x", "gates", "up", "up_bias", "down", "down_bias")
D, F, E = 8, 12, 3


def make_inputs(
    images: int = 2, tokens: int = 5, *, gated: bool = True, dtype: torch.dtype = torch.float64
) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    experts = E if gated else 1
    shapes = [(images, tokens, D), (images, E), (experts * F, D), (experts * F,), (D, experts * F)]
    shapes.append((E, D) if gated else (D,))
    tensors: list[Tensor | None] = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]
    if not gated:
        tensors[1] = None
    return tensors


def plain(act: Callable[[Tensor], Tensor], inputs: list[Tensor | None]) -> Tensor:
    """Eq. 10 written out, one expert after the other, by plain autograd."""
    x, gates, up, up_bias, down, down_bias = inputs
    if gates is None:
        return act(x @ up.t() + up_bias) @ down.t() + down_bias
    total = torch.zeros_like(x)
    for n in range(E):
        unit = slice(n * F, (n + 1) * F)
        hidden = act(x @ up[unit].t() + up_bias[unit])
        total = total + gates[:, n, None, None] * (hidden @ down[:, unit].t() + down_bias[n])
    return total


def gradients(out: Tensor, inputs: list[Tensor | None]) -> dict[str, Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = {n: t for n, t in zip(NAMES, inputs, strict=True) if t is not None and t.requires_grad}
    grads = torch.autograd.grad(out, list(wanted.values()), weight.to(out.dtype))
    return dict(zip(wanted, grads, strict=True))


def assert_equal_grads(found: dict[str, Tensor], expected: dict[str, Tensor], **limits) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(
            found[name], value, msg=lambda text, name=name: f"{name}: {text}", **limits
        )


@pytest.fixture(params=["one expert at a time", "all experts at once"])
def grouping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the way of the CPU and that of accelerators, both on the CPU."""
    if request.param == "all experts at once":
        monkeypatch.setattr(module, "_experts_at_once", lambda device, experts: experts)


@pytest.mark.usefixtures("grouping")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("act", ACTS)
def test_equals_plain_autograd_in_float64(act: str, gated: bool, recompute: bool) -> None:
    inputs = make_inputs(gated=gated)
    out = gated_ffn(*inputs, act=act, recompute=recompute)
    expected = plain(ACTS[act], inputs)
    limits = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(out, expected, **limits)
    assert_equal_grads(gradients(out, inputs), gradients(expected, inputs), **limits)
    with torch.no_grad():
        torch.testing.assert_close(gated_ffn(*inputs, act=act), expected, **limits)


@pytest.mark.usefixtures("grouping")
def test_gradients_equal_finite_differences() -> None:
    inputs = make_inputs(images=2, tokens=1)
    assert torch.autograd.gradcheck(lambda *tensors: gated_ffn(*tensors, act="gelu"), inputs)


@pytest.mark.usefixtures("grouping")
@pytest.mark.parametrize("shape", [(0, 5), (2, 1), (1, 5)])
@pytest.mark.parametrize("recompute", [False, True])
def test_batches_of_any_size(shape: tuple[int, int], recompute: bool) -> None:
    inputs = make_inputs(*shape)
    out = gated_ffn(*inputs, act="gelu", recompute=recompute)
    expected = plain(ACTS["gelu"], inputs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    found = gradients(out, inputs)
    assert_equal_grads(found, gradients(expected, inputs), rtol=1e-12, atol=1e-12)
    if not shape[0]:  # distributed training waits for these
        assert all(torch.equal(value, torch.zeros_like(value)) for value in found.values())


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("frozen", [*([name] for name in NAMES), NAMES[1:], NAMES[2:], NAMES[:1]])
def test_frozen_inputs_get_no_gradient(frozen: list[str], gated: bool) -> None:
    inputs = make_inputs(gated=gated)
    for name, tensor in zip(NAMES, inputs, strict=True):
        if tensor is not None:
            tensor.requires_grad_(name not in frozen)
    expected = gradients(plain(ACTS["quick_gelu"], inputs), inputs)
    found = gradients(gated_ffn(*inputs, act="quick_gelu"), inputs)
    assert_equal_grads(found, expected, rtol=1e-12, atol=1e-12)


def products_in(function: Callable[[], object]) -> int:
    with torch.profiler.profile() as profile:
        function()
    names = {"aten::mm", "aten::addmm_", "aten::addmm"}
    return sum(event.count for event in profile.key_averages() if event.key in names)


def test_products_of_gradients_that_nobody_needs_are_skipped() -> None:
    counts = {}
    for frozen in ((), ("x",), ("up",), ("down",), ("x", "gates", "up", "up_bias")):
        inputs = make_inputs()
        for name, tensor in zip(NAMES, inputs, strict=True):
            tensor.requires_grad_(name not in frozen)
        out = gated_ffn(*inputs, act="gelu").sum()
        counts[frozen] = products_in(out.backward)
    everything = counts[()]
    for name in ("x", "up", "down"):
        assert everything - counts[(name,)] == E, name
    # Left are the down-projection's own gradient, E products, and its bias's.
    assert counts[("x", "gates", "up", "up_bias")] == E + 1


def test_inputs_that_are_not_contiguous() -> None:
    inputs = make_inputs()
    strided = [
        None if t is None else t.detach().mT.contiguous().mT if t.dim() > 1 else t for t in inputs
    ]
    strided[0] = inputs[0].detach().transpose(0, 1).contiguous().transpose(0, 1)
    strided = [t.detach().requires_grad_() for t in strided]
    assert not strided[0].is_contiguous() and not strided[2].is_contiguous()
    expected = gradients(plain(ACTS["gelu"], inputs), inputs)
    out = gated_ffn(*strided, act="gelu")
    assert_equal_grads(gradients(out.mT.contiguous().mT, strided), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("grouping")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("gated", [True, False])
def test_autocast_computes_in_bfloat16_and_gives_float32_gradients(
    gated: bool, recompute: bool
) -> None:
    inputs = make_inputs(4, 16, gated=gated, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gated_ffn(*inputs, act="quick_gelu", recompute=recompute)
        found = gradients(out, inputs)  # a backward inside autocast, as some loops have it
    again = gradients(gated_under_autocast(inputs, recompute), inputs)
    expected = plain(ACTS["quick_gelu"], inputs)
    assert out.dtype == torch.bfloat16
    assert relative(out.float(), expected) < 0.02
    for name, value in gradients(expected, inputs).items():
        assert found[name].dtype == torch.float32
        assert relative(found[name], value) < 0.02, name
        assert torch.equal(found[name], again[name]), name


def gated_under_autocast(inputs: list[Tensor | None], recompute: bool) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return gated_ffn(*inputs, act="quick_gelu", recompute=recompute)


def relative(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


def test_autocast_leaves_float64_alone() -> None:
    inputs = make_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gated_ffn(*inputs, act="gelu")
    assert torch.equal(out, gated_ffn(*inputs, act="gelu"))


@pytest.mark.parametrize("recompute", [False, True])
def test_compiles_into_one_graph(recompute: bool) -> None:
    torch._dynamo.reset()
    inputs = make_inputs()
    compiled = torch.compile(
        lambda *tensors: gated_ffn(*tensors, act="quick_gelu", recompute=recompute),
        backend="aot_eager",
        fullgraph=True,
    )
    out, expected = compiled(*inputs), plain(ACTS["quick_gelu"], inputs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    expected_grads = gradients(expected, inputs)
    assert_equal_grads(gradients(out, inputs), expected_grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("recompute", [False, True])
def test_activation_checkpointing_gives_equal_gradients(recompute: bool) -> None:
    inputs = make_inputs()

    def block(*tensors: Tensor) -> Tensor:
        return torch.tanh(gated_ffn(*tensors, act="gelu_tanh", recompute=recompute))

    expected = gradients(block(*inputs), inputs)
    found = gradients(checkpoint(block, *inputs, use_reentrant=False), inputs)
    assert_equal_grads(found, expected, rtol=0, atol=0)


def kept_elements(function: Callable[[], Tensor], inputs: list[Tensor | None]) -> int:
    kept: dict[int, Tensor] = {}
    given = {t.data_ptr() for t in inputs if t is not None}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in given:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    assert result.shape == inputs[0].shape
    return sum(tensor.numel() for tensor in kept.values())


def test_keeps_the_pre_activation_or_nothing() -> None:
    inputs = make_inputs(2, 5)
    run = lambda recompute: gated_ffn(*inputs, act="gelu", recompute=recompute)  # noqa: E731
    assert kept_elements(lambda: run(False), inputs) == 2 * 5 * E * F
    assert kept_elements(lambda: run(True), inputs) == 0
    with torch.no_grad():
        assert kept_elements(lambda: run(False), inputs) == 0


def test_shapes_on_the_meta_device() -> None:
    inputs = [t.detach().to("meta").requires_grad_() for t in make_inputs()]
    out = gated_ffn(*inputs, act="gelu")
    assert out.shape == inputs[0].shape and out.is_meta
    grads = torch.autograd.grad(out, inputs, torch.empty_like(out))
    assert [g.shape for g in grads] == [t.shape for t in inputs]


@pytest.mark.parametrize("act", ACTS)
def test_experts_take_over_the_activation_of_the_ffn(act: str) -> None:
    torch.manual_seed(0)
    arch = {"hidden_dim": 8, "depth": 1, "num_heads": 2, "mlp_dim": 12}
    ffn = MLP(ViTConfig(image_size=16, patch_size=8, act=act, **arch)).double()
    experts = WideExperts(ffn, 3)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    gates = torch.rand(2, 3, dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(experts(x, gates), ffn(x, None), rtol=1e-12, atol=1e-12)


def test_unknown_activations_are_explained() -> None:
    with pytest.raises(ValueError, match=r"one of quick_gelu, gelu, gelu_tanh, found ReLU"):
        act_name(nn.ReLU())
    with pytest.raises(ValueError, match=r"did you mean 'gelu'"):
        gated_ffn(*make_inputs(), act="gellu")
