import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from miniature import ARCH
from torch import Tensor, nn

from covft.models.text_encoder import Context
from covft.models.vision.auxiliary_loss import collect_losses
from covft.models.vision.tower import VisionTower
from covft.registry import VFT
from covft.vft.q_moe import QMoE, QMoEConnector, QueryAttention, TextRouter

CONTEXT_DIM = 24
SIZES = dict(num_queries=6, dim=16, num_layers=2, num_experts=4, num_heads=2, ffn_dim=24)
FAMILIES = ["CLIP", "SigLIP", "DINOv2", "DINOv3", "InternViT"]


def make_context(images: int, dtype=torch.float32) -> Context:
    tokens = torch.randn(images, 5, CONTEXT_DIM, dtype=dtype)
    return Context(tokens[:, 0], tokens, torch.ones(images, 5, dtype=torch.bool))


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)


def make_tower(family: str = "CLIP", **vft) -> VisionTower:
    torch.manual_seed(0)
    tower = VisionTower(
        backbone=dict(type=family, arch=ARCH), vft=QMoE(**{**SIZES, **vft}), context_dim=CONTEXT_DIM
    )
    randomise(tower.backbone)
    return tower


def make_random_tower(family: str = "CLIP", **vft) -> VisionTower:
    tower = make_tower(family, **vft)
    randomise(tower.connector)
    return tower


def make_connector(width: int = 20) -> QMoEConnector:
    torch.manual_seed(0)
    connector = QMoEConnector(width, context_dim=CONTEXT_DIM, balance_loss=0.01, **SIZES)
    randomise(connector)
    return connector


def pixels(images: int = 3) -> Tensor:
    return torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8)


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def gates_of(connector: nn.Module, run) -> list[Tensor]:
    """Return each layer's gates (I, E) in a call of ``run``."""
    gates: list[Tensor] = []
    hooks = [
        layer.router.register_forward_hook(lambda _, __, out: gates.append(out.detach()))
        for layer in connector.layers
    ]
    run()
    for hook in hooks:
        hook.remove()
    return gates


def plain_linear(module: nn.Linear, x: Tensor) -> Tensor:
    return x @ module.weight.T + (0 if module.bias is None else module.bias)


def plain_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight + module.bias


def plain_attention(module: QueryAttention, queries: Tensor, memory: Tensor) -> Tensor:
    query = plain_linear(module.q_proj, queries)
    key, value = plain_linear(module.k_proj, memory), plain_linear(module.v_proj, memory)
    heads, width = [], key.shape[-1] // module.num_heads
    for head in range(module.num_heads):
        part = slice(head * width, (head + 1) * width)
        weights = torch.exp(query[:, part] @ key[:, part].T / math.sqrt(width))
        heads.append(weights / weights.sum(-1, keepdim=True) @ value[:, part])
    return plain_linear(module.out_proj, torch.cat(heads, -1))


def plain_connector(connector: QMoEConnector, features: Tensor, text: Tensor) -> Tensor:
    """One image, (N, D), with its text, (C,): only the chosen expert is computed."""
    normed = plain_norm(connector.norm, features)
    memory, queries = plain_linear(connector.feature_proj, normed), connector.queries
    for layer in connector.layers:
        inner = plain_norm(layer.norm1, queries)
        queries = queries + plain_attention(layer.self_attn, inner, inner)
        inner = plain_norm(layer.norm2, queries)
        queries = queries + plain_attention(layer.cross_attn, inner, memory)
        route = plain_linear(layer.router.proj, text).softmax(-1)
        best = int(route.argmax())
        up, _, down = layer.experts[best]
        hidden = F.gelu(plain_linear(up, plain_norm(layer.norm3, queries)))
        queries = queries + route[best] * plain_linear(down, hidden)
    found = plain_attention(connector.readout, normed, queries)
    return features + torch.tanh(connector.gamma) * found


def test_equals_the_formula_in_float64() -> None:
    connector = make_connector().double()
    one = torch.randn(4, 7, 20, dtype=torch.float64, requires_grad=True)
    two = one.detach().clone().requires_grad_()
    context = make_context(4, torch.float64)
    out = connector(one, context)
    expected = torch.stack(
        [plain_connector(connector, two[i], context.pooled[i]) for i in range(4)]
    )
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert (out - one).abs().max() > 0.05

    grad, parameters = torch.randn_like(out), list(connector.parameters())
    found = torch.autograd.grad(out, [one, *parameters], grad)
    wanted = torch.autograd.grad(
        expected, [two, *parameters], grad, allow_unused=True, materialize_grads=True
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_closed_gate_equals_the_frozen_encoder(family: str) -> None:
    tower = make_tower(family).eval()
    frozen = VisionTower(backbone=tower.backbone).eval()
    images, context = pixels(), make_context(3)
    assert QMoE.identity_at_init
    assert torch.equal(tower(images, context), frozen(images))
    with torch.no_grad():
        tower.connector.gamma.fill_(0.5)
    assert (tower(images, context) - frozen(images)).abs().max() > 1e-3


def test_the_instruction_alone_chooses_the_experts() -> None:
    tower = make_random_tower().eval()
    context, others = make_context(8), make_context(8)
    first = gates_of(tower.connector, lambda: tower(pixels(8), context))
    second = gates_of(tower.connector, lambda: tower(pixels(8), context))
    other = gates_of(tower.connector, lambda: tower(pixels(8), others))
    assert len(first) == 2
    for a, b, c in zip(first, second, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a > 0, c > 0)
        assert ((a > 0).sum(-1) == 1).all()  # one expert an image,
        assert (a > 0).any(0).sum() > 1  # but not the same for all
    assert not torch.equal(first[0], first[1])  # each layer has a router of its own


def test_only_the_pooled_text_is_read() -> None:
    tower = make_random_tower().eval()
    images, context = pixels(), make_context(3)
    padded = Context(context.pooled, torch.randn(3, 9, CONTEXT_DIM), torch.rand(3, 9) > 0.5)
    assert torch.equal(tower(images, context), tower(images, padded))
    other = dataclasses.replace(context, pooled=context.pooled.flip(0))
    assert (tower(images, context) - tower(images, other)).abs().max() > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient_enters_the_encoder(checkpointing: bool) -> None:
    tower = make_random_tower().train()
    tower.backbone.checkpointing = checkpointing
    seen: list[bool] = []
    tower.backbone.register_forward_hook(lambda _, __, out: seen.append(out.requires_grad))
    tower(pixels(), make_context(3)).square().sum().backward()
    assert seen == [False]
    assert all(p.grad is None and not p.requires_grad for p in tower.backbone.parameters())
    assert set(trained(tower)) == {f"connector.{n}" for n, _ in tower.connector.named_parameters()}


def test_every_parameter_gets_a_gradient_once_the_gate_is_open() -> None:
    connector = make_connector().double()
    features = torch.randn(24, 7, 20, dtype=torch.float64)
    context = make_context(24, torch.float64)
    gates = gates_of(connector, lambda: connector(features, context).square().sum().backward())
    assert all((gate > 0).any(0).all() for gate in gates)
    for name, parameter in connector.named_parameters():
        assert parameter.grad.abs().max() > 1e-6, name


def test_experts_not_chosen_have_zero_gradients() -> None:
    connector = make_connector()
    features, context = torch.randn(1, 7, 20), make_context(1)
    gates = gates_of(connector, lambda: connector(features, context).square().sum().backward())
    for gate, layer in zip(gates, connector.layers, strict=True):
        for index, expert in enumerate(layer.experts):
            for parameter in expert.parameters():
                assert bool(parameter.grad.any()) == bool(gate[0, index] > 0)


def test_no_images_keep_every_parameter_in_the_graph() -> None:
    tower = make_random_tower().train()
    with collect_losses(tower) as losses:
        features = tower(torch.zeros(0, 3, 32, 32), make_context(0))
    assert features.shape == (0, 16, 32)
    assert [loss.tolist() for loss in losses] == [0.0, 0.0]
    (features.sum() + sum(losses)).backward()
    for name, parameter in trained(tower).items():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_balance_loss_of_four_images() -> None:
    router = TextRouter(2, 2, balance_loss=0.01)
    with torch.no_grad():
        router.proj.weight.copy_(torch.eye(2))
        router.proj.bias.zero_()
    probs = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.8, 0.2], [0.1, 0.9]])
    with collect_losses(router) as losses:
        gates = router(probs.log())
        router.eval()(probs.log())
    expected = torch.tensor([[0.75, 0], [0.75, 0], [0.8, 0], [0, 0.9]])
    torch.testing.assert_close(gates, expected)
    # 2 experts x (share 3/4 x mean 0.6 + share 1/4 x mean 0.4), in training alone
    assert [loss.tolist() for loss in losses] == [pytest.approx(0.01 * 1.1)]
    losses[0].backward()
    # d/db_0 = 0.01 x 2 x (3/4 - 1/4) x mean(p (1 - p)), and the opposite for b_1
    slope = 0.01 * (2 * 0.1875 + 0.16 + 0.09) / 4
    torch.testing.assert_close(router.proj.bias.grad, torch.tensor([slope, -slope]))


@pytest.mark.parametrize("num_layers", [1, 2])
def test_balance_losses_of_the_layers_add_up_to_the_weight_when_balanced(num_layers: int) -> None:
    tower = make_tower(balance_loss=0.5, num_layers=num_layers).train()
    with torch.no_grad():
        for layer in tower.connector.layers:
            layer.router.proj.weight.zero_(), layer.router.proj.bias.zero_()
    with collect_losses(tower) as losses:
        tower(pixels(), make_context(3))
    assert [loss.item() for loss in losses] == pytest.approx([0.5 / num_layers] * num_layers)
    tower = make_tower(balance_loss=0).train()
    with collect_losses(tower) as losses:
        tower(pixels(), make_context(3))
    assert losses == []


@pytest.mark.parametrize("family", ["CLIP", "DINOv3"])
def test_bf16_is_close_to_float32(family: str) -> None:
    tower = make_random_tower(family).train()
    images, context = pixels(), make_context(3)
    expected = tower(images, context)
    with torch.autocast("cpu", dtype=torch.bfloat16), collect_losses(tower) as losses:
        features = tower(images, context)
    (features.float().square().sum() + sum(losses)).backward()
    assert all(torch.isfinite(p.grad).all() for p in trained(tower).values())
    assert (features - expected).norm() < 0.03 * expected.norm()
    whole = tower.bfloat16()(images, context)
    assert whole.dtype == torch.bfloat16
    assert (whole - expected).norm() < 0.05 * expected.norm()


def test_settings_and_context_are_checked() -> None:
    for name, least in (("num_experts", 2), ("num_queries", 1), ("num_layers", 1), ("ffn_dim", 1)):
        with pytest.raises(ValueError, match=f"vft.{name} must be at least {least}"):
            QMoE(**{name: least - 1})
    with pytest.raises(ValueError, match=r"dim \(20\) must be a multiple of vft.num_heads \(8\)"):
        QMoE(dim=20)
    with pytest.raises(ValueError, match="balance_loss must not be negative"):
        QMoE(balance_loss=-0.1)
    with pytest.raises(ValueError, match="text_encoder"):
        VisionTower(backbone=dict(type="CLIP", arch=ARCH), vft=QMoE(**SIZES))
    with pytest.raises(ValueError, match="without context"):
        make_tower()(pixels())
    with pytest.raises(ValueError, match="3 images, but context rows for 2"):
        make_tower()(pixels(3), make_context(2))
    with pytest.raises(ValueError, match="QMoE"):
        make_tower().export_state_dict()


def test_full_size_counts() -> None:
    with torch.device("meta"):
        tower = VisionTower(backbone=dict(type="CLIP"), vft=dict(type="Q-MoE"), context_dim=768)
    assert VFT.get("QMoE") is VFT.get("Q-MoE") is QMoE
    assert sum(p.numel() for p in trained(tower).values()) == 23_144_969
    expert = 2 * 512 * 2048 + 2048 + 512
    assert sum(p.numel() for p in tower.connector.layers[0].experts.parameters()) == 4 * expert
    tokens = torch.zeros(2, 9, 768, device="meta")
    context = Context(tokens[:, 0], tokens, torch.ones(2, 9, dtype=torch.bool, device="meta"))
    features = tower(torch.zeros(2, 3, 336, 336, device="meta"), context)
    assert features.shape == (2, 576, 1024)
