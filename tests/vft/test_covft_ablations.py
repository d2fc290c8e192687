"""CoVFT's options: contexts and routings (Table 2), layer ranges (Table 4), shared CVE."""

import pytest
import torch
from covft_miniature import (
    ARCH,
    EXPERTS,
    IMAGES,
    TEXT,
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
from torch.func import functional_call

from covft.checkpoints.trainable import load_weights, save_weights
from covft.models.text_encoder import Context
from covft.models.vision.tower import VisionTower
from covft.vft.comoe import CoMoE
from covft.vft.covft import CoVFT


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def plain_residual(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weights = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(name)}
    inner = quick_gelu(x @ weights["fc1.weight"].T + weights["fc1.bias"])
    out = x + inner @ weights["fc2.weight"].T + weights["fc2.bias"]
    return nn.functional.layer_norm(out, out.shape[-1:], weights["ln.weight"], weights["ln.bias"])


def plain_context(state: dict[str, Tensor], context: str, x: Tensor, text: Tensor) -> Tensor:
    if context == "cve":
        image = plain_residual(state, "image_resblock", x)
        query = plain_residual(state, "text_resblock", text)[:, None]
        both = torch.cat([image, query.expand(-1, image.shape[1], -1)], dim=-1)
        attention = nn.MultiheadAttention(TEXT, 4, kdim=WIDTH + TEXT, vdim=WIDTH + TEXT)
        attention.batch_first = True
        prefix = "cross_attn."
        weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        return functional_call(attention, weights, (query, both, both))[0][:, 0]
    mean = sum(x[:, n] for n in range(x.shape[1])) / x.shape[1]
    return {"text-only": text, "image-only": mean, "concat": torch.cat([mean, text], 1)}[context]


def plain_gates(state: dict[str, Tensor], options: dict, x: Tensor, text: Tensor) -> Tensor:
    kind, _, number = options.get("routing", "dense").partition("@")
    if kind in ("uniform", "random"):
        return torch.full((len(x), EXPERTS), 1 / EXPERTS, dtype=x.dtype)
    context = options.get("context", "cve")
    if context == "none":
        logits = state["gate.bias"].repeat(len(x), 1)
    else:
        vector = plain_context(state, context, x, text)
        logits = vector @ state["gate.weight"].T + state["gate.bias"]
    exponentials = logits.exp()
    if kind == "sparse":
        smallest_kept = logits.sort(dim=1, descending=True).values[:, int(number) - 1, None]
        exponentials = exponentials * (logits >= smallest_kept)
    return exponentials / exponentials.sum(1, keepdim=True)


def plain_comoe(state: dict[str, Tensor], options: dict, x: Tensor, text: Tensor) -> Tensor:
    gates = plain_gates(state, options, x, text)
    out = torch.zeros_like(x)
    for n in range(EXPERTS):
        up, up_bias, down, down_bias = (
            state[f"experts.{n}.{k}.{p}"] for k in (0, 2) for p in ("weight", "bias")
        )
        out = out + gates[:, n, None, None] * (quick_gelu(x @ up.T + up_bias) @ down.T + down_bias)
    return out


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_a_plain_reference_in_float64(name: str) -> None:
    tower = make_tower(**VARIANTS[name]).double().eval()
    (layer,) = comoe_of(tower)
    randomise(layer)
    state = {k: v.clone().requires_grad_() for k, v in layer.public_state_dict().items()}
    x1 = torch.randn(IMAGES, 17, WIDTH, dtype=torch.float64, requires_grad=True)
    x2 = x1.detach().clone().requires_grad_()
    context = in_double(make_inputs()[1])
    out, expected = layer(x1, context), plain_comoe(state, VARIANTS[name], x2, context.pooled)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)

    weights = torch.randn_like(out)
    out.backward(weights), expected.backward(weights)
    torch.testing.assert_close(x1.grad, x2.grad, rtol=1e-10, atol=1e-10)
    with torch.no_grad():  # our gradients, read through the same map as our weights
        for parameter in layer.parameters():
            parameter.copy_(parameter.grad)
        for buffer in layer.buffers():
            buffer.zero_()
    for key, value in layer.public_state_dict().items():
        torch.testing.assert_close(value, state[key].grad, rtol=1e-10, atol=1e-10, msg=key)


@pytest.mark.parametrize("name", VARIANTS)
def test_public_names_round_trip(name: str) -> None:
    (one,), (two,) = (comoe_of(make_tower(seed=seed, **VARIANTS[name])) for seed in (0, 1))
    randomise(one)
    two.load_public_state_dict(one.public_state_dict())
    for (key, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    given = {"gate.weight", "gate.bias"} & one.public_state_dict().keys()
    learned = {"uniform": set(), "random": set(), "none": {"gate.bias"}}
    assert given == learned.get(name, {"gate.weight", "gate.bias"})


def test_every_variant_gives_other_features_once_experts_differ() -> None:
    outputs = {}
    for name, options in VARIANTS.items():
        tower = make_tower(**options).eval()
        for layer in comoe_of(tower):
            randomise(layer.experts)
            randomise(layer.router, seed=4)
        with torch.no_grad():
            outputs[name] = tower(*make_inputs())
    torch.testing.assert_close(outputs.pop("random"), outputs["uniform"], rtol=0, atol=0)
    for one, a in outputs.items():
        for two, b in outputs.items():
            assert one == two or (a - b).abs().max() > 1e-3, (one, two)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_features_at_initialisation_are_the_frozen_encoders(name: str, training: bool) -> None:
    plain = make_tower().backbone
    expected = VisionTower(backbone=dict(type="CLIP", arch=ARCH)).eval()
    tuned = make_tower(**VARIANTS[name]).train(training)
    state = {k: v for k, v in plain.state_dict().items() if "blocks.2.mlp" not in k}
    mlp = comoe_of(tuned)[0].experts.per_expert()
    for ours, theirs in (("0", "fc1"), ("2", "fc2")):
        for p in ("weight", "bias"):
            state[f"blocks.2.mlp.{theirs}.{p}"] = mlp[f"0.{ours}.{p}"]
    expected.backbone.load_state_dict(state)
    pixels, context = make_inputs()
    torch.testing.assert_close(tuned(pixels, context), expected(pixels), rtol=1e-5, atol=1e-5)


def saved_bytes(layer: CoMoE, context: Context) -> int:
    """Return the bytes, parameters left out, that a forward of ``layer`` keeps for its backward."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(IMAGES, 200, WIDTH, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layer(x, context)
    return sum(kept.values()) if out.requires_grad else 0


@pytest.mark.parametrize("name", VARIANTS)
def test_recompute_keeps_less_and_gives_the_same_gradients(name: str) -> None:
    towers = [
        make_tower(recompute=recompute, **VARIANTS[name]).double().train()
        for recompute in (False, True)
    ]
    for tower in towers:
        randomise(comoe_of(tower)[0])
    context = in_double(make_inputs()[1])
    kept, less = (saved_bytes(comoe_of(tower)[0], context) for tower in towers)
    assert 0 < less < 0.7 * kept
    expected, found = (gradients(tower, context=context) for tower in towers)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-12, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", ["uniform", "random", "image-only", "none"])
def test_variants_without_text_need_no_text_encoder(name: str, tiny_options) -> None:
    assert make_mllm(tiny_options, **VARIANTS[name]).text_encoder is None
    tower = VisionTower(backbone=dict(type="CLIP", arch=ARCH), vft=CoVFT(**VARIANTS[name]))
    assert not tower.needs_context
    assert tower.vft.context_free_blocks(tower.backbone) == len(tower.backbone.blocks)
    pixels, context = make_inputs()
    assert torch.equal(tower.eval()(pixels), tower(pixels, context))


@pytest.mark.parametrize("name", ["cve", "text-only", "concat"])
def test_variants_with_text_say_so(name: str) -> None:
    method = CoVFT(first_block=1, **VARIANTS[name])
    with pytest.raises(ValueError, match=r"add model\.text_encoder"):
        VisionTower(backbone=dict(type="CLIP", arch=ARCH), vft=method)
    tower = make_tower(first_block=1, **VARIANTS[name])
    assert tower.needs_context and tower.vft.context_free_blocks(tower.backbone) == 1
    with pytest.raises(ValueError, match="without context"):
        tower(make_inputs()[0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(), range(11, 23)),
        (dict(first_block=0, last_block=22), range(23)),
        (dict(first_block=0, last_block=10), range(11)),
        (dict(first_block=11, last_block=22), range(11, 23)),
        (dict(first_block=15), range(15, 23)),
        (dict(first_block=19, last_block=22), range(19, 23)),
        (dict(last_block=11), range(11, 12)),
    ],
)
def test_layer_range_replaces_exactly_those_blocks(options: dict, expected: range) -> None:
    with torch.device("meta"):
        tower = VisionTower(
            backbone=dict(type="CLIP", arch={**ARCH, "depth": 24}),
            vft=CoVFT(**options),
            context_dim=TEXT,
        )
    blocks = tower.backbone.blocks
    assert len(blocks) == 23
    assert [i for i, b in enumerate(blocks) if isinstance(b.mlp, CoMoE)] == list(expected)
    frozen = [
        i for i, b in enumerate(blocks) if not any(p.requires_grad for p in b.mlp.parameters())
    ]
    assert frozen == [i for i in range(23) if i not in expected]
    assert tower.vft.context_free_blocks(tower.backbone) == expected.start


@pytest.mark.parametrize("num_experts", [2, 8])
def test_number_of_experts(num_experts: int) -> None:
    with torch.device("meta"):
        towers = [
            VisionTower(backbone=dict(type="CLIP"), vft=CoVFT(num_experts=e), context_dim=768)
            for e in (num_experts, 4)
        ]
    one, four = (sum(p.numel() for p in tower.parameters() if p.requires_grad) for tower in towers)
    ffn_and_logit = 2 * 1024 * 4096 + 4096 + 1024 + 769
    assert four - one == 12 * (4 - num_experts) * ffn_and_logit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_experts=0), "num_experts must be at least 1, got 0"),
        (dict(num_experts=1), "num_experts=1 leaves routing 'dense' nothing to learn"),
        (dict(num_experts=1, context="none"), "num_experts=1 leaves routing 'dense' nothing"),
        (
            dict(num_experts=1, routing="sparse@1"),
            "num_experts=1 leaves routing 'sparse@1' nothing",
        ),
        (dict(routing="top2"), "routing must be 'dense', 'sparse@k', 'uniform' or 'random@k'"),
        (dict(routing="sparse@1"), "router gets no gradient from the task"),
        (dict(routing="sparse@5"), "chooses 5 of 4 experts; choose 2 to 4"),
        (dict(routing="random@0"), "chooses 0 of 4 experts; choose 1 to 4"),
        (
            dict(context="text"),
            "must be one of auto, cve, text-only, image-only, concat, none, got",
        ),
        (dict(context=None), "got None; for a router without input, use 'none'"),
        (dict(context=None, routing="uniform"), "got None; for a router without input"),
        (dict(context="cve", routing="uniform"), "would be ignored: routing 'uniform'"),
        (dict(context="none", routing="random@2"), "would be ignored: routing 'random@2'"),
        (dict(shared_cve=True, context="concat"), "shared_cve=True is an option of CVE"),
        (dict(shared_cve=True, first_block=2), "no effect: block 2 is the only one with CoMoE"),
        (dict(activation="gelu", routing="uniform"), "activation='gelu' is an option of CVE"),
        (dict(balance_loss=0.1), "with 'dense' routing it has no effect"),
        (dict(balance_loss=-0.1, routing="sparse@2"), "must not be negative, got -0.1"),
        (dict(balance_loss=0.1, routing="sparse@4"), "balance_loss=0.1 has no effect: 'sparse@4'"),
        (dict(first_block=-1), "first_block is -1, but the encoder consumes 3 blocks"),
        (dict(first_block=0, last_block=3), "last_block is 3, but the encoder consumes 3 blocks"),
        (dict(first_block=2, last_block=1), r"first_block \(2\) comes after vft.last_block \(1\)"),
    ],
)
def test_options_that_are_wrong_or_without_effect_are_explained(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_tower(**{"first_block": 1, **options})


def test_an_unknown_activation_is_refused_before_anything_is_built() -> None:
    with pytest.raises(ValueError, match=r"vft\.activation 'rleu' is unknown; did you mean"):
        CoVFT(activation="rleu")


def test_a_text_that_cves_heads_do_not_divide_names_the_key() -> None:
    backbone = dict(type="CLIP", arch=ARCH)
    message = r"4 heads don't divide the context's width 30, that of model\.text_encoder"
    with pytest.raises(ValueError, match=message):
        VisionTower(backbone=backbone, vft=CoVFT(), context_dim=30)
    VisionTower(backbone=backbone, vft=CoVFT(context="text-only"), context_dim=30)


@pytest.mark.parametrize(
    ("routing", "resolved"), [("dense", "cve"), ("sparse@2", "cve"), ("uniform", "none")]
)
def test_context_auto_is_cve_where_a_router_learns(routing: str, resolved: str) -> None:
    assert CoVFT(routing=routing).context == resolved
    assert CoVFT(routing=routing, context="auto").context == resolved


def test_one_expert_without_a_router_trains_a_plain_ffn() -> None:
    tower = make_tower(num_experts=1, routing="uniform")
    assert all(g is not None and g.any() for g in gradients(tower).values())


def test_shared_cve_is_one_module_with_the_sum_of_the_gradients() -> None:
    shared = make_tower(first_block=0, shared_cve=True).train()
    apart = make_tower(first_block=0).train()
    layers = comoe_of(shared)
    assert len({id(layer.cve) for layer in layers}) == 1 < len(layers)
    for one, two in zip(layers, comoe_of(apart), strict=True):
        randomise(one.experts)
        randomise(one.router)
        two.load_state_dict(one.state_dict())
    found, expected = gradients(shared), gradients(apart)
    sizes = [sum(p.numel() for p in t.parameters()) for t in (shared, apart)]
    assert sizes[1] - sizes[0] == 2 * sum(p.numel() for p in layers[0].cve.parameters())
    for key in (key for key in found if "mlp.cve" in key):
        summed = sum(expected[key.replace("blocks.0", f"blocks.{i}")] for i in range(3))
        torch.testing.assert_close(found[key], summed, rtol=1e-4, atol=1e-5, msg=key)


def test_shared_cve_is_saved_and_loaded(tmp_path) -> None:
    trained = make_tower(first_block=1, shared_cve=True).eval()
    randomise(comoe_of(trained)[0])
    randomise(comoe_of(trained)[1], seed=7)
    save_weights(trained, tmp_path / "weights.safetensors", metadata={})
    for load in ("file", "state dict"):
        other = make_tower(first_block=1, shared_cve=True).eval()
        if load == "file":
            load_weights(other, tmp_path / "weights.safetensors")
        else:
            other.load_state_dict(trained.state_dict())
        one, two = comoe_of(other)
        assert one.cve is two.cve
        with torch.no_grad():
            assert torch.equal(other(*make_inputs()), trained(*make_inputs()))


def test_weights_of_an_unshared_cve_are_refused_by_a_shared_one(tmp_path) -> None:
    apart = make_tower(first_block=1).eval()
    save_weights(apart, tmp_path / "weights.safetensors", metadata={})
    with pytest.raises(ValueError, match=r"different values for .*cve.* which the model shares"):
        load_weights(make_tower(first_block=1, shared_cve=True), tmp_path / "weights.safetensors")
