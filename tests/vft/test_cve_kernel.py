import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from covft.models.checkpointing import saved_bytes
from covft.vft.cve import CVE

WIDTH, CONTEXT = 16, 12
ACTS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


def make_cve(act: str = "quick_gelu", *, recompute: bool = False) -> CVE:
    torch.manual_seed(0)
    cve = CVE(WIDTH, CONTEXT, num_heads=4, activation=act, recompute=recompute).double()
    with torch.no_grad():
        for tensor in (*cve.parameters(), *cve.buffers()):
            tensor.add_(torch.randn_like(tensor) * 0.3)
    return cve


def make_inputs(images: int = 3, tokens: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((images, tokens, WIDTH), (images, CONTEXT))
    tokens_, text = (
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    )
    return tokens_, text


def refine(state: dict[str, Tensor], name: str, x: Tensor, act: str) -> Tensor:
    """Eq. 7, with the public code's biases and LayerNorm."""
    w = {key.removeprefix(name): value for key, value in state.items() if key.startswith(name)}
    hidden = ACTS[act](x @ w[".fc1.weight"].t() + w[".fc1.bias"])
    inner = x + hidden @ w[".fc2.weight"].t() + w[".fc2.bias"]
    return F.layer_norm(inner, x.shape[-1:], w[".ln.weight"], w[".ln.bias"])


def plain(cve: CVE, tokens: Tensor, text: Tensor, act: str) -> Tensor:
    """Eq. 8 with keys and values of every token."""
    state = cve.public_state_dict()
    attention = nn.MultiheadAttention(
        CONTEXT, 4, kdim=WIDTH + CONTEXT, vdim=WIDTH + CONTEXT, batch_first=True
    ).double()
    prefix = "cross_attn."
    attention.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    )
    image = refine(state, "image_resblock", tokens, act)
    query = refine(state, "text_resblock", text, act)[:, None]
    keys = torch.cat([image, query.expand(-1, image.shape[1], -1)], dim=-1)
    return attention(query, keys, keys)[0][:, 0]


def gradients(cve: CVE, out: Tensor, *inputs: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return list(torch.autograd.grad(out, [*inputs, *cve.parameters()], weight))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("act", ACTS)
def test_equals_attention_over_all_tokens(act: str, recompute: bool) -> None:
    cve, (tokens, text) = make_cve(act, recompute=recompute), make_inputs()
    out, expected = cve(tokens, text), plain(cve, tokens, text, act)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(out)
    found = torch.autograd.grad(out, (tokens, text), weight)
    wanted = torch.autograd.grad(expected, (tokens, text), weight)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("images", [0, 3])
def test_recompute_and_checkpointing_give_equal_gradients(images: int) -> None:
    inputs = make_inputs(images)
    cve, other = make_cve(), make_cve(recompute=True)
    expected = gradients(cve, cve(*inputs), *inputs)
    assert all(bool(grad.any()) == bool(images) for grad in expected)
    for found in (
        gradients(other, other(*inputs), *inputs),
        gradients(cve, checkpoint(cve, *inputs, use_reentrant=False), *inputs),
        gradients(other, checkpoint(other, *inputs, use_reentrant=False), *inputs),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_recompute_keeps_no_hidden_units() -> None:
    tokens, text = make_inputs(images=2, tokens=64)
    kept = {}
    for recompute in (False, True):
        cve = make_cve(recompute=recompute)
        kept[recompute] = saved_bytes(lambda cve=cve: cve(tokens, text), excluded=cve.parameters())
    hidden = 2 * WIDTH * 64 + 2 * CONTEXT
    assert kept[False] - kept[True] == 8 * 2 * hidden


def test_float32_weights_under_bfloat16_autocast() -> None:
    cve, inputs = make_cve(), make_inputs()
    expected = gradients(cve, cve(*inputs), *inputs)
    cve, inputs = cve.float(), [t.detach().float().requires_grad_() for t in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = cve(*inputs)
    for found, wanted in zip(gradients(cve, out, *inputs), expected, strict=True):
        assert found.dtype == torch.float32
        assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_unknown_activation_is_explained() -> None:
    with pytest.raises(ValueError, match="activation 'relu' is unknown"):
        make_cve("relu")
