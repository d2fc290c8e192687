"""What every VFT method must do on every encoder."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from miniature import ARCH as MINIATURE
from torch import Tensor, nn

from covft.checkpoints.trainable import load_weights, save_weights
from covft.models.text_encoder import Context
from covft.models.vision.auxiliary_loss import collect_losses
from covft.models.vision.tower import VisionTower
from covft.registry import VFT
from covft.vft.base import VFTMethod

torch.set_num_threads(1)

ENCODERS = ["CLIP", "SigLIP", "DINOv2", "DINOv3", "InternViT"]
ARCH = {**MINIATURE, "depth": 4}
CONTEXT_DIM = 24
IMAGES = 4
QMOE_SIZES = dict(num_queries=5, dim=16, num_layers=2, num_experts=2, num_heads=2)

#: Names inside one CoMoE layer, CVE and router included.
_RESIDUAL = {f"{part}.{p}" for part in ("fc1", "fc2", "ln") for p in ("weight", "bias")}
_EXPERTS = {f"experts.{p}" for p in ("up", "up_bias", "down", "down_bias")}
_CVE = (
    {f"cve.{p}" for p in ("q_proj", "k_proj", "v_proj", "q_bias", "v_bias")}
    | {f"cve.{block}.{p}" for block in ("image_resblock", "text_resblock") for p in _RESIDUAL}
    | {"cve.out_proj.weight", "cve.out_proj.bias"}
)
_ROUTER = {"router.weight", "router.bias"}


@dataclass(frozen=True)
class Method:
    """A method's config and what is expected of it.

    Attributes:
        config: Its arguments, ``type`` included.
        trainable: The exact trainable names, given the plain encoder's.
        still: Pattern of trainable names whose gradient is zero, with the reason as a comment.
    """

    config: dict[str, Any]
    trainable: Callable[[set[str]], set[str]]
    still: str = field(default="(?!)")


def _blocks(names: set[str]) -> list[int]:
    return sorted({int(match[1]) for name in names if (match := re.match(r"blocks\.(\d+)", name))})


def _biases(names: set[str]) -> set[str]:
    return {name for name in names if name.endswith(".bias")}


def _lora(names: set[str]) -> set[str]:
    return {
        f"blocks.{i}.attn.{projection}.{matrix}"
        for i in _blocks(names)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj")
        for matrix in ("lora_a", "lora_b")
    }


def _comoe(*parts: set[str], first: int | None = None) -> Callable[[set[str]], set[str]]:
    def expected(names: set[str]) -> set[str]:
        blocks = _blocks(names)
        start = len(blocks) // 2 if first is None else first
        norms = {name for name in names if re.match(r"blocks\.\d+\.norm[12]\.", name)}
        inside = set().union(*parts)
        return norms | {f"blocks.{i}.mlp.{part}" for i in blocks[start:] for part in inside}

    return expected


def _covft(*parts: set[str], still: str = "(?!)", **options: Any) -> Method:
    return Method(dict(type="CoVFT", **options), _comoe(_EXPERTS, *parts), still)


def _vpt(names: set[str]) -> set[str]:
    return {f"blocks.{i}.prompts" for i in _blocks(names)}


def _svpt(names: set[str]) -> set[str]:
    blocks = _blocks(names)
    # The first block has none before it, so no gate.
    gates = {f"blocks.{i}.gate.{p}" for i in blocks[1:] for p in ("weight", "bias")}
    return _vpt(names) | gates | {f"blocks.{i}.gamma" for i in blocks}


def _qa_vit(names: set[str]) -> set[str]:
    text = {f"text_proj.{part}" for part in ("0.weight", "0.bias", "1.weight", "3.weight")}
    added = text | {"gated_proj.weight", "gated_proj.bias", "beta"}
    # Half of the published depth, 4, of which a family may consume 3.
    return {f"blocks.{i}.attn.{part}" for i in _blocks(names)[2:] for part in added}


def _q_moe(names: set[str]) -> set[str]:
    linear = [f"{p}_proj.{kind}" for p in ("q", "v", "out") for kind in ("weight", "bias")]
    attentions, affine = ["readout"], ["feature_proj", "norm"]
    for i in range(2):
        inside = ["norm1", "norm2", "norm3", "router.proj"]
        inside += [f"experts.{expert}.{fc}" for expert in range(2) for fc in (0, 2)]
        affine += [f"layers.{i}.{part}" for part in inside]
        attentions += [f"layers.{i}.self_attn", f"layers.{i}.cross_attn"]
    found = {f"{attention}.{p}" for attention in attentions for p in (*linear, "k_proj.weight")}
    found |= {f"{module}.{kind}" for module in affine for kind in ("weight", "bias")}
    return {f"connector.{name}" for name in found | {"queries", "gamma"}}


METHODS = {
    "Freeze": Method(dict(type="Freeze"), lambda names: set()),
    # A bias that is added to all keys alike has no effect: softmax is invariant to it.
    "Full": Method(dict(type="Full"), lambda names: names, still=r"k_proj\.bias$"),
    "BitFit": Method(dict(type="BitFit"), _biases, still=r"k_proj\.bias$"),
    "LoRA": Method(dict(type="LoRA", rank=4), _lora),
    "VPT": Method(dict(type="VPT", num_prompts=3), _vpt),
    "SVPT": Method(dict(type="SVPT", num_prompts=3), _svpt),
    "QAViT": Method(dict(type="QAViT"), _qa_vit),
    "QMoE": Method(dict(type="QMoE", **QMOE_SIZES), _q_moe),
    "CoVFT": _covft(_CVE, _ROUTER),
    "CoVFT-recompute": _covft(_CVE, _ROUTER, recompute=True),
    "CoVFT-sparse": _covft(_CVE, _ROUTER, routing="sparse@2", balance_loss=0.01),
    "CoVFT-text": _covft(_ROUTER, context="text-only"),
    "CoVFT-image": _covft(_ROUTER, context="image-only"),
    "CoVFT-uniform": _covft(routing="uniform"),
}

#: One variant of each method, and the one whose control flow depends on the data, which breaks the
#: graph: an expert's images are its inputs.
COMPILED = [name for name in METHODS if name != "Freeze" and "-" not in name] + ["CoVFT-sparse"]


def all_pairs(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test for every method on every encoder."""
    return pytest.mark.parametrize("encoder", ENCODERS)(
        pytest.mark.parametrize("name", list(METHODS))(test)
    )


def plain_tower(encoder: str, *, seed: int = 0, **backbone: Any) -> VisionTower:
    """Return a frozen encoder in which no parameter has a special value."""
    torch.manual_seed(seed)
    if encoder == "InternViT":
        backbone.setdefault("drop_path", 0.2)
    tower = VisionTower(backbone=dict(type=encoder, arch=ARCH, **backbone))
    randomise(tower.parameters())
    return tower


def tuned_tower(
    name: str, encoder: str, *, seed: int = 0, perturbed: bool = False, **backbone: Any
) -> VisionTower:
    """Apply a method to the encoder of :func:`plain_tower`.

    Args:
        name: A key of ``METHODS``.
        encoder: An encoder family.
        seed: Of the encoder and of what the method adds.
        perturbed: Whether to break the symmetries of initialisation.
        backbone: Further arguments of the encoder.
    """
    base = plain_tower(encoder, seed=seed, **backbone).backbone
    tower = VisionTower(backbone=base, vft=METHODS[name].config, context_dim=CONTEXT_DIM)
    if perturbed:
        torch.manual_seed(seed + 1)
        randomise(parameter for parameter in tower.parameters() if parameter.requires_grad)
    return tower


@torch.no_grad()
def randomise(parameters: Any) -> None:
    for parameter in parameters:
        parameter.add_(torch.randn_like(parameter) * 0.2)


def inputs(images: int = IMAGES) -> tuple[Tensor, Context]:
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    # Opposite texts, so that between them every expert of a sparse router is chosen.
    tokens = 3 * torch.randn(images // 2, 6, CONTEXT_DIM, generator=generator)
    tokens = torch.cat([tokens, -tokens])
    mask = torch.arange(6) < 4 + torch.arange(images)[:, None] % 3
    return pixels, Context(tokens[:, 0], tokens, mask)


def trainable(tower: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in tower.named_parameters() if p.requires_grad}


def backward(tower: VisionTower, images: int = IMAGES) -> dict[str, Tensor | None]:
    """Return the gradients of a loss that weighs every feature differently."""
    torch.manual_seed(3)  # dropout, DropPath
    with collect_losses(tower) as extra:
        features = tower(*inputs(images))
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(5))
    loss = (features * weights).sum() + sum(extra)
    if loss.requires_grad:
        loss.backward()
    return {name: parameter.grad for name, parameter in trainable(tower).items()}


def on_backbone(names: set[str]) -> set[str]:
    return {f"backbone.{name}" for name in names}


@all_pairs
def test_exactly_these_parameters_train(name: str, encoder: str) -> None:
    plain = {n.removeprefix("backbone.") for n, _ in plain_tower(encoder).named_parameters()}
    expected = METHODS[name].trainable(plain)
    found = {
        key if key.startswith("connector.") else key.removeprefix("backbone.")
        for key in trainable(tuned_tower(name, encoder))
    }
    assert found == expected


@all_pairs
def test_features_at_init_are_those_of_the_frozen_encoder_if_claimed(
    name: str, encoder: str
) -> None:
    frozen = plain_tower(encoder).double().eval()
    tower = tuned_tower(name, encoder).double().eval()
    pixels, context = inputs()
    context = Context(context.pooled.double(), context.tokens.double(), context.mask)
    with torch.no_grad():
        distance = (tower(pixels, context) - frozen(pixels)).abs().max().item()
    if tower.vft.identity_at_init:
        assert distance < 1e-10
    else:
        assert distance > 1e-4


@all_pairs
def test_every_trainable_parameter_gets_a_gradient(name: str, encoder: str) -> None:
    tower = tuned_tower(name, encoder, perturbed=True).train()
    gradients = backward(tower)
    largest = max((g.abs().max().item() for g in gradients.values() if g is not None), default=0)
    for key, gradient in gradients.items():
        assert gradient is not None, key
        moves = gradient.abs().max().item() > 1e-6 * largest
        assert moves != bool(re.search(METHODS[name].still, key)), key


@all_pairs
def test_a_batch_without_images_keeps_the_parameters_in_the_graph(name: str, encoder: str) -> None:
    for key, gradient in backward(tuned_tower(name, encoder).train(), images=0).items():
        assert gradient is not None, key
        assert not gradient.any(), key


@all_pairs
def test_a_step_changes_nothing_else(name: str, encoder: str) -> None:
    tower = tuned_tower(name, encoder, perturbed=True).train()
    before = {key: value.clone() for key, value in tower.state_dict().items()}
    backward(tower)
    names = set(trainable(tower))
    if names:
        torch.optim.SGD(trainable(tower).values(), lr=1.0).step()
    changed = {k for k, value in tower.state_dict().items() if not torch.equal(value, before[k])}
    assert changed <= names
    assert changed >= {key for key in names if not re.search(METHODS[name].still, key)}


@all_pairs
def test_activation_checkpointing_gives_equal_gradients(name: str, encoder: str) -> None:
    kept = backward(tuned_tower(name, encoder, perturbed=True).train())
    recomputing = tuned_tower(name, encoder, perturbed=True, checkpointing=True).train()
    for key, gradient in backward(recomputing).items():
        torch.testing.assert_close(gradient, kept[key], rtol=1e-6, atol=1e-6, msg=key)


@all_pairs
def test_the_trained_weights_restore_the_model(name: str, encoder: str, tmp_path) -> None:
    trained = tuned_tower(name, encoder, perturbed=True).eval()
    save_weights(trained, tmp_path / "weights.safetensors", metadata={})
    rebuilt = tuned_tower(name, encoder).eval()
    # Another seed for what the method adds, the same pretrained encoder.
    torch.manual_seed(99)
    randomise(trainable(rebuilt).values())
    load_weights(rebuilt, tmp_path / "weights.safetensors")
    with torch.no_grad():
        assert torch.equal(rebuilt(*inputs()), trained(*inputs()))

    other = tuned_tower(name, encoder, seed=5).eval()
    other.load_state_dict(trained.state_dict())
    with torch.no_grad():
        assert torch.equal(other(*inputs()), trained(*inputs()))


@all_pairs
def test_a_plain_export_gives_equal_features_or_is_refused(name: str, encoder: str) -> None:
    tower = tuned_tower(name, encoder, perturbed=True).double().eval()
    if name not in ("Freeze", "Full", "BitFit", "LoRA"):
        with pytest.raises(ValueError, match=r"isn't a plain ViT.* say so by plain_state_dict"):
            tower.export_state_dict()
        return
    plain = plain_tower(encoder, seed=4).double().eval()
    backbone = plain.backbone
    backbone.load_state_dict(backbone.import_state_dict(tower.export_state_dict()))
    pixels, context = inputs()
    with torch.no_grad():
        torch.testing.assert_close(plain(pixels), tower(pixels, context), rtol=1e-10, atol=1e-10)


@all_pairs
def test_the_text_matters_exactly_where_it_is_said_to(name: str, encoder: str) -> None:
    tower = tuned_tower(name, encoder, perturbed=True).eval()
    pixels, context = inputs()
    other = Context(context.pooled + 1, context.tokens.flip(2), context.mask)
    with torch.no_grad():
        same = torch.equal(tower(pixels, context), tower(pixels, other))
        assert same != tower.needs_context
        if not tower.needs_context:
            assert torch.equal(tower(pixels), tower(pixels, context))
            return
        with pytest.raises(ValueError, match="context"):
            tower(pixels)
        with pytest.raises(ValueError, match="4 images"):
            tower(pixels, context.rows(torch.tensor([0, 1])))


@all_pairs
def test_blocks_said_to_ignore_the_text_do(name: str, encoder: str) -> None:
    tower = tuned_tower(name, encoder, perturbed=True).eval()
    blocks = tower.backbone.blocks
    free = tower.vft.context_free_blocks(tower.backbone)
    assert 0 <= free <= len(blocks)
    outputs: list[list[Tensor]] = []
    hooks = [b.register_forward_hook(lambda m, i, out: outputs[-1].append(out)) for b in blocks]
    pixels, context = inputs()
    with torch.no_grad():
        for text in (context, Context(context.pooled + 1, context.tokens + 1, context.mask)):
            outputs.append([])
            tower(pixels, text)
    for hook in hooks:
        hook.remove()
    same = [torch.equal(one, two) for one, two in zip(*outputs, strict=True)]
    assert same[:free] == [True] * free
    assert not any(same[free:])


@all_pairs
def test_builds_on_the_meta_device(name: str, encoder: str) -> None:
    with torch.device("meta"):
        tower = VisionTower(
            backbone=dict(type=encoder), vft=METHODS[name].config, context_dim=CONTEXT_DIM
        )
    assert all(parameter.is_meta for parameter in tower.parameters())


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n == "CoVFT-sparse" else ()) for n in COMPILED],
)
def test_compiles(name: str) -> None:
    torch._dynamo.reset()
    # As few blocks as possible, for compiling takes seconds for each; QA-ViT's first is the third.
    layer = 3 if name == "QAViT" else 2
    eager = tuned_tower(name, "DINOv3", perturbed=True, select_layer=layer).eval()
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=name != "CoVFT-sparse")
    pixels, context = inputs()
    expected = eager(pixels, context)
    torch.testing.assert_close(compiled(pixels, context), expected, rtol=1e-5, atol=1e-5)
    kept = torch.autograd.grad(expected.sum(), list(trainable(eager).values()))
    found = torch.autograd.grad(compiled(pixels, context).sum(), list(trainable(eager).values()))
    for one, two in zip(kept, found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_documented_example_of_a_method_trains_and_exports(encoder: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    (code,) = re.findall(r"```python\n(@VFT\.register_module.*?)```", page, flags=re.DOTALL)
    code = code.replace("@VFT.register_module()\n", "")  # other tests count the methods
    names: dict[str, Any] = {"VFTMethod": VFTMethod}
    exec(f"from __future__ import annotations\n{code}", names)
    base = plain_tower(encoder).backbone
    tower = VisionTower(backbone=base, vft=names["NormTuning"]()).train()
    gradients = backward(tower)
    expected = {n for n, _ in base.named_parameters() if re.match(r"blocks\.\d+\.norm[12]\.", n)}
    assert gradients.keys() == on_backbone(expected)
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    randomise(trainable(tower).values())
    plain = plain_tower(encoder, seed=4)
    plain.backbone.load_state_dict(plain.backbone.import_state_dict(tower.export_state_dict()))
    with torch.no_grad():
        assert torch.equal(plain.eval()(inputs()[0]), tower.eval()(inputs()[0]))


def test_every_registered_method_is_under_contract() -> None:
    tested = {VFT.get(method.config["type"]) for method in METHODS.values()}
    assert {VFT.get(name) for name in VFT.names()} == tested
