"""Routing at inference: gates read, fixed or cut to the largest."""

import pytest
import torch
from covft_miniature import (
    ARCH,
    EXPERTS,
    IMAGES,
    TEXT,
    VARIANTS,
    comoe_of,
    make_inputs,
    make_mllm,
    make_tower,
    randomise,
)
from PIL import Image
from torch import Tensor, nn

from covft.datasets import InputSpec
from covft.datasets.prompts import Prompt, collate_prompts
from covft.models.vision.feature_cache import FeatureCache
from covft.models.vision.tower import VisionTower
from covft.vft.inference import collect_gates, comoe_layers, inference_routing


def tuned(**vft) -> VisionTower:
    """A tower with CoMoE in blocks 1 and 2 whose experts and routers differ, in float64."""
    tower = make_tower(**{"first_block": 1, **vft}).double().eval()
    for layer in comoe_of(tower):
        randomise(layer)
    return tower


def features(tower: VisionTower, images: int = IMAGES) -> Tensor:
    pixels, context = make_inputs(images)
    with torch.no_grad():
        return tower(pixels, context)


def states(tower: VisionTower) -> list:
    return [layer.inference for layer in comoe_of(tower)]


class WithGates(nn.Module):
    """A CoMoE layer's experts under given gates, one after the other."""

    def __init__(self, layer: nn.Module, gates: Tensor) -> None:
        super().__init__()
        self.state, self.act, self.gates = layer.public_state_dict(), layer.experts.act, gates

    def forward(self, x: Tensor, context) -> Tensor:
        out = torch.zeros_like(x)
        for n in range(EXPERTS):
            up, up_bias, down, down_bias = (
                self.state[f"experts.{n}.{k}.{p}"] for k in (0, 2) for p in ("weight", "bias")
            )
            expert = self.act(x @ up.T + up_bias) @ down.T + down_bias
            out = out + self.gates[:, n, None, None] * expert
        return out


@pytest.mark.parametrize("name", VARIANTS)
def test_collected_gates_used_as_fixed_ones_give_equal_features(name: str) -> None:
    tower = tuned(**VARIANTS[name])
    pixels, context = make_inputs()
    expected = features(tower)
    gates = collect_gates(tower, pixels, context)
    assert list(gates) == [1, 2]
    for value in gates.values():
        assert value.shape == (IMAGES, EXPERTS) and not value.requires_grad
        torch.testing.assert_close(value.sum(1), torch.ones(IMAGES, dtype=torch.float64))
    with inference_routing(tower, gates=gates), torch.no_grad():
        found = tower(pixels)  # neither CVE nor router: no text is needed
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not any(layer.router._forward_hooks for layer in comoe_of(tower))


def test_collected_gates_are_the_routers_outputs() -> None:
    tower = tuned()
    seen: dict[int, Tensor] = {}
    for index, layer in comoe_layers(tower).items():
        layer.router.register_forward_hook(lambda m, i, out, index=index: seen.update({index: out}))
    gates = collect_gates(tower, *make_inputs())
    assert not torch.equal(gates[1], gates[2])
    for index, value in seen.items():
        assert torch.equal(gates[index], value)


def test_given_gates_replace_cve_and_router_where_named() -> None:
    tower = tuned()
    first, last = comoe_of(tower)
    called: list[nn.Module] = []
    for layer in (first, last):
        for module in (layer.cve, layer.router):
            module.register_forward_hook(lambda m, i, out: called.append(m))
    gates = torch.rand(IMAGES, EXPERTS, dtype=torch.float64)
    with inference_routing(tower, gates={2: gates}):
        found = features(tower)
    assert called == [first.cve, first.router]
    tower.backbone.blocks[2].mlp = WithGates(last, gates)
    torch.testing.assert_close(found, features(tower), rtol=1e-12, atol=1e-12)


def test_top_k_of_all_experts_is_dense_routing() -> None:
    tower = tuned()
    with inference_routing(tower, top_k=EXPERTS):
        assert torch.equal(features(tower), features(tuned()))


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("fixed", [False, True])
def test_top_k_equals_a_reference(top_k: int, fixed: bool) -> None:
    tower, reference = tuned(last_block=1), tuned(last_block=1)
    (gates,) = collect_gates(tower, *make_inputs()).values()
    kept = gates.clone()
    for row in kept:
        row[row.argsort()[: EXPERTS - top_k]] = 0
        row /= row.sum()
    reference.backbone.blocks[1].mlp = WithGates(comoe_of(tower)[0], kept)
    dense = features(tower)
    with inference_routing(tower, top_k=top_k, gates={1: gates} if fixed else None):
        found = features(tower)
    torch.testing.assert_close(found, features(reference), rtol=1e-12, atol=1e-12)
    assert (found - dense).abs().max() > 1e-3


@pytest.mark.parametrize("top_k", [None, 2])
@torch.no_grad()
def test_one_row_of_gates_serves_any_number_of_images(top_k: int | None) -> None:
    tower = tuned()
    rows = {i: torch.rand(1, EXPERTS, dtype=torch.float64) for i in (1, 2)}
    one_and_all = {1: rows[1], 2: rows[2].repeat(IMAGES, 1)}
    repeated = {i: row.repeat(IMAGES, 1) for i, row in rows.items()}
    with inference_routing(tower, top_k=top_k, gates=repeated):
        expected = features(tower)
    with inference_routing(tower, top_k=top_k, gates=rows):
        torch.testing.assert_close(features(tower), expected, rtol=1e-12, atol=1e-12)
        for images in (0, 2):
            few = features(tower, images)
            wanted = tower(make_inputs(images)[0])
            assert few.shape == (images, *expected.shape[1:]) and torch.equal(few, wanted)
    with inference_routing(tower, top_k=top_k, gates=one_and_all):
        torch.testing.assert_close(features(tower), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_the_text_is_needed_until_every_router_that_reads_it_is_replaced() -> None:
    tower, (pixels, context) = tuned(), make_inputs()
    gates = collect_gates(tower, pixels, context)
    reads = tower.vft.reads_context
    assert reads(tower.backbone)
    for some in (dict(top_k=1), dict(gates={1: gates[1]})):
        with inference_routing(tower, **some):
            assert reads(tower.backbone)
            with pytest.raises(ValueError, match="without context"):
                tower(pixels)
    with inference_routing(tower, gates=gates):
        assert not reads(tower.backbone)
        expected = tower(pixels, context)
        assert torch.equal(tower(pixels), expected)
        assert torch.equal(tower(pixels, cache=FeatureCache()), expected)
    assert reads(tower.backbone)
    other = tuned(context="image-only")
    assert not other.vft.reads_context(other.backbone)


@torch.no_grad()
def test_gates_changed_meanwhile_have_no_effect() -> None:
    tower = tuned()
    gates = torch.rand(1, EXPERTS, dtype=torch.float64)
    with inference_routing(tower, gates={1: gates}):
        expected = features(tower)
        gates.zero_()
        assert torch.equal(features(tower), expected)


def test_nothing_stays_changed_outside() -> None:
    tower = tuned()
    expected = features(tower)
    gates = torch.rand(IMAGES, EXPERTS, dtype=torch.float64)
    with inference_routing(tower, top_k=1):
        alone = features(tower)
        outer = states(tower)
        with (
            pytest.raises(RuntimeError, match="on purpose"),
            inference_routing(tower, gates={1: gates}),
        ):
            assert not torch.equal(features(tower), alone)
            raise RuntimeError("on purpose")
        assert states(tower) == outer
        assert torch.equal(features(tower), alone)
    assert states(tower) == [None, None]
    assert torch.equal(features(tower), expected)
    with pytest.raises(ValueError, match="given for the blocks"):
        inference_routing(tower, gates={0: gates}).__enter__()
    assert states(tower) == [None, None]
    pixels, _ = make_inputs()
    with pytest.raises(ValueError, match="without context"):
        collect_gates(tower, pixels, None)
    assert not any(layer.router._forward_hooks for layer in comoe_of(tower))


def test_training_and_gradients_are_refused() -> None:
    tower = tuned()
    with inference_routing(tower, top_k=1):
        with pytest.raises(ValueError, match=r"use torch\.no_grad"):
            tower(*make_inputs())
        tower.train()
        with pytest.raises(ValueError, match=r"call model\.eval"):
            features(tower)
    with pytest.raises(ValueError, match=r"call model\.eval"), inference_routing(tower, top_k=1):
        pass


def test_what_is_wrong_is_explained() -> None:
    tower = tuned()
    good = torch.rand(IMAGES, EXPERTS, dtype=torch.float64)
    wrong = [
        (dict(), "changes nothing without top_k or gates"),
        (dict(top_k=0), "top_k must be 1 to 4, the layers' experts; got 0"),
        (dict(top_k=5), "got 5"),
        (dict(gates={}), "changes nothing without top_k or gates"),
        (dict(gates={0: good, 1: good}), r"for the blocks \[0\], but CoMoE layers are in \[1, 2\]"),
        (dict(gates={1: good[:, :3]}), r"expected \(images, 4\) or \(1, 4\), got \(5, 3\)"),
        (dict(gates={1: good, 2: good[:2]}), r"different image counts: \[2, 5\]"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message), inference_routing(tower, **arguments):
            pass
    with inference_routing(tower, gates={1: good}):
        with pytest.raises(ValueError, match="3 images, but inference_routing's gates for 5"):
            features(tower, images=3)
        with pytest.raises(ValueError, match="call it outside"):
            collect_gates(tower, *make_inputs())
    frozen = VisionTower(backbone=dict(type="CLIP", arch=ARCH), context_dim=TEXT)
    with pytest.raises(ValueError, match="tuned by Freeze and has no CoMoE layers"):
        collect_gates(frozen, *make_inputs())


def test_an_mllm_generates_under_it(tiny_options) -> None:
    model = make_mllm(tiny_options).eval()
    image = Image.new("RGB", (32, 32), (200, 30, 30))
    turns = [{"from": "human", "value": "<image>is there a red shape?"}]
    batch = collate_prompts([Prompt("one", turns, [image])], InputSpec.of(model))
    computed: list[int] = []
    for layer in comoe_of(model.vision):
        layer.cve.register_forward_hook(lambda m, i, out: computed.append(len(out)))
    model.generate(**batch, max_new_tokens=2)
    assert computed == [1] * len(comoe_of(model.vision))
    gates = {i: torch.eye(EXPERTS)[:1] for i in comoe_layers(model.vision)}
    twice = collate_prompts([Prompt(name, turns, [image]) for name in "ab"], InputSpec.of(model))
    model.text_encoder.register_forward_hook(lambda m, i, out: computed.append(0))
    with inference_routing(model.vision, gates=gates):
        assert len(model.generate(**batch, max_new_tokens=2)[0]) == 2
        expected = model.generate(**twice, max_new_tokens=2)
        assert [len(ids) for ids in expected] == [2, 2]
        for key in ("context_ids", "context_mask"):
            twice.pop(key)
        assert model.generate(**twice, max_new_tokens=2) == expected
    assert len(computed) == len(gates)
    with pytest.raises(ValueError, match="holds no context_ids"):
        model.generate(**twice, max_new_tokens=2)
