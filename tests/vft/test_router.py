"""Sparse, random and balanced routing of CoMoE."""

import pytest
import torch
from covft_miniature import (
    EXPERTS,
    IMAGES,
    VARIANTS,
    WIDTH,
    comoe_of,
    gradients,
    in_double,
    make_inputs,
    make_mllm,
    make_tower,
    randomise,
)
from torch import Tensor, nn

from covft.datasets import Collator, EasyVQADataset, InputSpec
from covft.models.vision.auxiliary_loss import collect_losses
from covft.vft.comoe import CoMoE
from covft.vft.routed_experts import routed_experts
from covft.vft.router import load_balance


def test_sparse_gates_are_zero_outside_the_largest_and_train_only_the_chosen() -> None:
    (layer,) = comoe_of(make_tower(routing="sparse@2").double())
    randomise(layer)
    seen = []
    layer.router.register_forward_hook(lambda module, inputs, gates: seen.append(gates.detach()))
    _, context = make_inputs(1)
    x = torch.randn(1, 17, WIDTH, dtype=torch.float64)
    layer(x, in_double(context)).square().sum().backward()
    (gates,) = seen
    chosen = gates[0] != 0
    assert chosen.sum() == 2 and gates.sum() == pytest.approx(1)
    for name in ("up", "up_bias"):
        moved = getattr(layer.experts, name).grad.unflatten(0, (EXPERTS, -1)).flatten(1).any(1)
        assert torch.equal(moved, chosen), name
    moved = layer.experts.down.grad.unflatten(1, (EXPERTS, -1)).any(0).any(1)
    assert torch.equal(moved, chosen)
    assert torch.equal(layer.experts.down_bias.grad.any(1), chosen)
    assert torch.equal(layer.router.weight.grad.any(1), chosen)


@pytest.mark.parametrize("images", [0, 1, 6])
def test_computing_the_chosen_alone_equals_zeros_in_the_dense_sum(images: int) -> None:
    layer = comoe_of(make_tower().double())[0].experts
    randomise(layer)
    gates = torch.rand(images, EXPERTS, dtype=torch.float64)
    gates = gates.masked_fill(gates < 0.6, 0).requires_grad_()
    x = torch.randn(images, 17, WIDTH, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    inputs = [x, *layer.parameters()]
    out, expected = routed_experts(layer, x, gates), layer(x, gates)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad((out * weights).sum(), [gates, *inputs])
    wanted = torch.autograd.grad((expected * weights).sum(), [gates, *inputs])
    torch.testing.assert_close(found[0], wanted[0] * (gates != 0), rtol=1e-11, atol=1e-11)
    for one, two in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


def test_random_routing_draws_per_image_and_layer_in_training_alone() -> None:
    tower = make_tower(routing="random@2", first_block=1).train()
    seen: list[Tensor] = []
    for layer in comoe_of(tower):
        layer.router.register_forward_hook(lambda module, inputs, gates: seen.append(gates))
        randomise(layer)
    pixels, _ = make_inputs(40)
    one = tower(pixels)
    for gates in seen:
        assert set(gates.unique().tolist()) == {0.0, 0.5}
        assert torch.equal(gates.sum(1), torch.ones(40))
        assert (gates.mean(0) > 0.1).all() and len(gates.unique(dim=0)) > 2
    assert not torch.equal(*seen)
    assert not torch.equal(tower(pixels), one)
    assert torch.equal(tower.eval()(pixels), tower(pixels))
    assert torch.equal(seen[-1], torch.full((40, EXPERTS), 0.25))


@pytest.mark.parametrize("images", [0, IMAGES])
@pytest.mark.parametrize("name", ["sparse", "random", "none", "image-only"])
def test_checkpointing_gives_the_same_gradients_for_every_parameter(name: str, images: int) -> None:
    found = []
    for checkpointing in (False, True):
        balance = dict(balance_loss=0.5) if name == "sparse" else {}
        tower = make_tower(checkpointing=checkpointing, **VARIANTS[name], **balance).train()
        randomise(comoe_of(tower)[0])
        found.append(gradients(tower, images))
    for key, gradient in found[0].items():
        assert gradient is not None, key
        assert torch.equal(gradient, found[1][key]), key
        assert bool(gradient.any()) == (images > 0), key


@pytest.mark.parametrize("name", VARIANTS)
def test_autocast_in_bf16_stays_close(name: str) -> None:
    tower = make_tower(**VARIANTS[name]).eval()
    (layer,) = comoe_of(tower)
    randomise(layer)
    with torch.no_grad():  # far apart, so that rounding doesn't change which logits are largest
        layer.router.load_state_dict(
            {
                k: v + torch.arange(4.0) * 3 if k == "bias" else v * 0.1
                for k, v in layer.router.state_dict().items()
            }
        )
    expected = tower(*make_inputs())
    with torch.autocast("cpu", torch.bfloat16):
        found = tower(*make_inputs())
    distance = (found.float() - expected).norm() / expected.norm()
    assert 0 < distance < 0.03
    found.float().square().sum().backward()
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, key


def plain_balance(logits: Tensor, top_k: int) -> float:
    """Fedus et al., eq. 4-6, with k dispatches an image."""
    images, experts = logits.shape
    total = 0.0
    for e in range(experts):
        dispatched = sum(
            e in sorted(range(experts), key=lambda n: -row[n])[:top_k] for row in logits.tolist()
        )
        mean = sum((row.exp() / row.exp().sum())[e].item() for row in logits) / images
        total += dispatched / (top_k * images) * mean
    return experts * total


def router_inputs(layers: list[CoMoE]) -> dict[nn.Module, Tensor]:
    """Return a dict that the next forwards fill with the context vectors of each router."""
    vectors: dict[nn.Module, Tensor] = {}

    def keep(router: nn.Module, inputs: tuple[Tensor]) -> None:
        vectors.setdefault(router, inputs[0].detach())

    for layer in layers:
        layer.router.register_forward_pre_hook(keep)
    return vectors


def test_balance_loss_equals_a_hand_computation() -> None:
    tower = make_tower(routing="sparse@2", balance_loss=0.3, first_block=1).double().train()
    for layer in comoe_of(tower):
        randomise(layer)
    vectors = router_inputs(comoe_of(tower))
    pixels, context = make_inputs()
    with collect_losses(tower) as losses:
        tower(pixels, in_double(context))
    expected = [
        0.3 / 2 * plain_balance((v @ m.weight.T + m.bias).detach(), 2) for m, v in vectors.items()
    ]
    assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-12)
    with collect_losses(tower.eval()) as losses:
        tower(pixels, in_double(context))
    assert losses == []


def test_load_balance_is_one_when_uniform_and_more_when_not() -> None:
    even = torch.full((4, 4), 0.25)
    assert load_balance(even, torch.eye(4, dtype=torch.bool)).item() == pytest.approx(1)
    skewed = torch.tensor([[0.7, 0.1, 0.1, 0.1]] * 4)
    chosen = torch.tensor([[True, False, False, False]] * 4)
    assert load_balance(skewed, chosen).item() == pytest.approx(4 * 0.7)


def test_balance_loss_reaches_the_router_through_the_mllm(tiny_options) -> None:
    found = []
    for checkpointing in (False, True):
        model = make_mllm(tiny_options, routing="sparse@2", balance_loss=0.3)
        model.vision.backbone.checkpointing = checkpointing
        dataset = EasyVQADataset(tiny_options["train_dataset.root"], spec=InputSpec.of(model))
        batch = Collator(dataset.spec)([dataset[i] for i in range(3)])
        batch.pop("bad_samples")
        vectors = router_inputs(comoe_of(model.vision))
        output = model(**batch)
        terms = [plain_balance((v @ m.weight.T + m.bias).detach(), 2) for m, v in vectors.items()]
        assert output.auxiliary.item() == pytest.approx(0.3 * sum(terms) / len(terms), rel=1e-10)
        output.auxiliary.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    routers = [key for key in found[0] if "router" in key]
    assert len(routers) == 2 * len(terms)
    for key, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][key], rtol=1e-12, atol=1e-12, msg=key)
    assert all(found[0][key].abs().max() > 1e-8 for key in routers)
