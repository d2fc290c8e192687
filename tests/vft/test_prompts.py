"""VPT and SVPT against references that run the plain encoder's blocks one by one."""

import copy
import math

import pytest
import torch
from miniature import ARCH as MINIATURE
from torch import Tensor, nn

from covft.models.vision.tower import VisionTower
from covft.vft.svpt import SVPT
from covft.vft.vpt import VPT

ARCH = {**MINIATURE, "depth": 4}
FAMILIES = ["CLIP", "SigLIP", "DINOv2", "DINOv3", "InternViT"]
COUNT = 5


def make_backbone(family: str = "CLIP", **options) -> nn.Module:
    torch.manual_seed(0)
    options = {"arch": ARCH, **options}
    backbone = VisionTower(backbone=dict(type=family, **options)).backbone
    randomise(backbone)
    return backbone.double()


def make_tower(family: str, method: type, *, options=None, **vft) -> VisionTower:
    """Build an encoder in float64 whose prompts, gates and gammas are far from their start."""
    vft = {"num_prompts": COUNT, **vft}
    tower = VisionTower(backbone=make_backbone(family, **(options or {})), vft=method(**vft))
    randomise(nn.ParameterList(trained(tower).values()))
    return tower


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)


def pixels(images: int = 3) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(images, 3, 32, 32, dtype=torch.float64)


def trained(tower: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in tower.named_parameters() if p.requires_grad}


def insert(x: Tensor, prompts: Tensor, place: int) -> Tensor:
    return torch.cat([x[:, :place], prompts.expand(len(x), -1, -1), x[:, place:]], dim=1)


def vpt_reference(tower: VisionTower, images: Tensor) -> Tensor:
    backbone = tower.backbone
    place = backbone.num_prefix
    x, rope = backbone.embed(images), backbone._rope(images.device)
    for prompted in backbone.blocks:
        x = prompted.block(insert(x, prompted.prompts, place), None, rope)
        x = torch.cat([x[:, :place], x[:, place + COUNT :]], dim=1)
    return x[:, place:]


def without_affine(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def attention_of_readers(block: nn.Module, tokens: Tensor, has_cls: bool, rope) -> Tensor:
    """Attention (heads, T) of CLS, or of the patches' mean query, for one image's tokens (T, D)."""
    states, attention = block.norm1(tokens), block.attn
    found = []
    for head in torch.arange(len(tokens[0])).chunk(attention.num_heads):
        query = attention.q_proj(states)[:, head]
        key = attention.k_proj(states)[:, head]
        if rope is not None:
            for position, (cos, sin) in enumerate(zip(*rope, strict=True), len(tokens) - 16):
                for vectors in (query, key):
                    first, second = vectors[position].clone().chunk(2)
                    turned = torch.cat([-second, first])
                    vectors[position] = vectors[position] * cos + turned * sin
        reader = query[0] if has_cls else query[-16:].mean(0)
        found.append((key @ reader / math.sqrt(len(head))).softmax(0))
    return torch.stack(found)


def svpt_reference(tower: VisionTower, images: Tensor, count: int) -> Tensor:
    """One image after the other, one patch after the other."""
    backbone = tower.backbone
    place, rope = backbone.num_prefix, backbone._rope(images.device)
    results = []
    for x in backbone.embed(images):
        prompts = outputs = None
        for connected in backbone.blocks:
            own = connected.prompts
            if prompts is not None:
                gate = connected.gate
                scores = without_affine(outputs) @ gate.weight[0] + gate.bias
                own = own + scores.tanh()[:, None] * prompts
            prompts = own
            tokens = insert(x[None], prompts, place)[0]
            seen = attention_of_readers(connected.block, tokens, backbone.config.use_cls, rope)
            salient = seen.mean(0)[-16:].argsort(descending=True)[:count]
            out = connected.block(tokens[None], None, rope)[0]
            outputs = out[place : place + COUNT]
            x = torch.cat([out[:place], out[place + COUNT :]]).clone()
            for patch in salient + place:
                scores = without_affine(prompts) @ without_affine(x[patch]) / math.sqrt(32)
                x[patch] = x[patch] + connected.gamma * (scores.softmax(0) @ prompts)
        results.append(x[place:])
    return torch.stack(results)


@pytest.mark.parametrize("family", FAMILIES)
def test_vpt_equals_the_reference_in_float64(family: str) -> None:
    tower = make_tower(family, VPT).eval()
    expected = vpt_reference(tower, pixels())
    torch.testing.assert_close(tower(pixels()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "arch"), [*((family, {}) for family in FAMILIES), ("DINOv3", {"use_cls": False})]
)
@torch.no_grad()
def test_svpt_equals_the_reference_in_float64(family: str, arch: dict) -> None:
    tower = make_tower(family, SVPT, options={"arch": {**ARCH, **arch}}, top_ratio=0.3).eval()
    for block in tower.backbone.blocks:
        block.gamma.fill_(0.7)
    expected = svpt_reference(tower, pixels(), count=5)  # 0.3 * 16 = 4.8
    torch.testing.assert_close(tower(pixels()), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [False, True])
def test_svpt_starts_as_vpt_with_the_same_prompts(family: str, training: bool) -> None:
    features = []
    for method in (VPT, SVPT):
        torch.manual_seed(2)
        tower = VisionTower(backbone=make_backbone(family), vft=method(dropout=0.5))
        features.append(tower.train(training)(pixels()))
    torch.testing.assert_close(*features, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["gate.weight", "gate.bias", "gamma"])
def test_each_part_of_svpt_changes_the_features(name: str) -> None:
    torch.manual_seed(2)
    tower = VisionTower(backbone=make_backbone(), vft=SVPT(num_prompts=COUNT)).eval()
    before = tower(pixels())
    with torch.no_grad():
        parameter = tower.get_parameter(f"backbone.blocks.1.{name}")
        parameter.add_(torch.randn_like(parameter))
    assert (tower(pixels()) - before).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["CLIP", "SigLIP", "DINOv3"])
def test_only_svpt_reads_the_outputs_of_earlier_prompts(family: str) -> None:
    for method, reads in ((VPT, False), (SVPT, True)):
        tower = make_tower(family, method).eval()
        place = tower.backbone.num_prefix
        before = tower(pixels())

        def disturb(module: nn.Module, args: tuple, out: Tensor, place: int = place) -> Tensor:
            out = out.clone()
            out[:, place : place + COUNT] += torch.randn_like(out[:, place : place + COUNT])
            return out

        tower.backbone.blocks[0].block.register_forward_hook(disturb)
        assert torch.equal(tower(pixels()), before) != reads, method


@pytest.mark.parametrize("family", ["CLIP", "SigLIP", "DINOv3"])
@pytest.mark.parametrize(("ratio", "count"), [(0.25, 4), (0.08, 1), (0.01, 1), (1.0, 16)])
@torch.no_grad()
def test_gamma_changes_exactly_the_salient_patches(family: str, ratio: float, count: int) -> None:
    tower = make_tower(family, SVPT, top_ratio=ratio).eval()
    backbone, images = tower.backbone, pixels()
    block, rope = backbone.blocks[0], backbone._rope(images.device)
    outs = []
    for gamma in (0.0, 0.7):
        block.gamma.fill_(gamma)
        outs.append(block(backbone.embed(images), None, rope))
    changed = (outs[0] != outs[1]).any(-1)
    assert changed.shape[1] == backbone.num_prefix + 2 * COUNT + 16
    assert changed[:, -16:].sum(1).tolist() == [count] * 3
    assert not changed[:, :-16].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_prompts_equal_the_frozen_encoder(family: str) -> None:
    backbone = make_backbone(family)
    expected = VisionTower(backbone=copy.deepcopy(backbone))(pixels())
    tower = VisionTower(backbone=backbone, vft=VPT(num_prompts=0)).train()
    assert torch.equal(tower(pixels()), expected)
    assert trained(tower) == {}


@pytest.mark.parametrize("method", [VPT, SVPT])
@torch.no_grad()
def test_initial_prompts(method: type) -> None:
    bound = math.sqrt(6 / (3 * 8**2 + 32))
    uniform = VisionTower(backbone=make_backbone(), vft=method())
    for block in uniform.backbone.blocks:
        assert block.prompts.shape == (50, 32)
        assert 0.95 * bound < block.prompts.abs().max() < bound
        assert block.prompts.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    normal = VisionTower(backbone=make_backbone(), vft=method(init="normal"))
    prompts = torch.stack([block.prompts for block in normal.backbone.blocks])
    assert prompts.std() == pytest.approx(1.0, rel=0.1)
    assert prompts.abs().max() > 2


@pytest.mark.parametrize("method", [VPT, SVPT])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_gives_equal_gradients_and_they_reach_everything(
    family: str, method: type
) -> None:
    grads = []
    for checkpointing in (False, True):
        tower = make_tower(family, method, options={"checkpointing": checkpointing}, dropout=0.3)
        tower.train()(pixels()).square().sum().backward()
        assert all(p.grad is None for p in tower.parameters() if not p.requires_grad)
        grads.append({name: p.grad for name, p in trained(tower).items()})
    for name, grad in grads[0].items():
        assert grad is not None, name
        assert grad.any(), name
        assert torch.equal(grad, grads[1][name]), name


@pytest.mark.parametrize("method", [VPT, SVPT])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_methods_parameters_train(family: str, method: type) -> None:
    tower = make_tower(family, method)
    blocks = len(tower.backbone.blocks)
    expected = {f"backbone.blocks.{i}.prompts" for i in range(blocks)}
    if method is SVPT:
        expected |= {f"backbone.blocks.{i}.gamma" for i in range(blocks)}
        expected |= {
            f"backbone.blocks.{i}.gate.{leaf}"
            for i in range(1, blocks)
            for leaf in ("weight", "bias")
        }
    assert set(trained(tower)) == expected


@pytest.mark.parametrize("method", [VPT, SVPT])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_batch_gives_zero_gradients(family: str, method: type) -> None:
    tower = make_tower(family, method).train()
    features = tower(pixels(0))
    assert features.shape == (0, 16, 32)
    features.sum().backward()
    for name, parameter in trained(tower).items():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("method", [VPT, SVPT])
def test_dropout_is_drawn_for_each_image_in_training_only(method: type) -> None:
    tower = make_tower("CLIP", method, dropout=0.5)
    twins = pixels(1).expand(2, -1, -1, -1)
    one, two = tower.train()(twins)
    assert (one - two).abs().max() > 1e-3
    one, two = tower.eval()(twins)
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", [VPT, SVPT])
def test_frozen_blocks_keep_drop_path_off(method: type) -> None:
    tower = make_tower("InternViT", method, options={"drop_path": 0.9}, dropout=0.0)
    assert torch.equal(tower.train()(pixels()), tower.eval()(pixels()))


@pytest.mark.parametrize("method", [VPT, SVPT])
@pytest.mark.parametrize("family", ["SigLIP", "DINOv3"])
@pytest.mark.parametrize("autocast", [False, True])
def test_runs_and_trains_in_bfloat16(family: str, method: type, autocast: bool) -> None:
    tower = make_tower(family, method, **({} if method is VPT else {"top_ratio": 1.0})).eval()
    expected = tower(pixels())
    tower.float() if autocast else tower.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        features = tower(pixels())
    assert (features - expected).norm() / expected.norm() < 0.1
    features.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in trained(tower).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prompts": -1}, r"vft\.num_prompts must be at least [01], got -1"),
        ({"dropout": 1.0}, r"vft\.dropout must be in \[0, 1\), got 1\.0"),
        ({"init": "xavier"}, r"vft\.init must be 'uniform' or 'normal', got 'xavier'"),
    ],
)
@pytest.mark.parametrize("method", [VPT, SVPT])
def test_options_out_of_range_are_explained(method: type, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(**options)


@pytest.mark.parametrize("option", [dict(dropout=0.2), dict(init="normal")])
def test_options_of_no_prompts_are_refused(option: dict) -> None:
    with pytest.raises(ValueError, match=r"have no effect with num_prompts=0"):
        VPT(num_prompts=0, **option)


def test_svpts_own_options_are_explained() -> None:
    with pytest.raises(ValueError, match=r"vft\.num_prompts must be at least 1, got 0"):
        SVPT(num_prompts=0)
    for ratio in (0.0, 1.1):
        with pytest.raises(ValueError, match=r"vft\.top_ratio must be in \(0, 1\], got"):
            SVPT(top_ratio=ratio)


def test_a_prompted_encoder_cant_be_exported_as_a_plain_one() -> None:
    for method in (VPT, SVPT):
        with pytest.raises(ValueError, match=f"tuned by {method.__name__} isn't a plain ViT"):
            make_tower("CLIP", method).export_state_dict()


@pytest.mark.parametrize(("method", "count"), [(VPT, 1_177_600), (SVPT, 1_177_600 + 22_573)])
def test_full_size_counts(method: type, count: int) -> None:
    with torch.device("meta"):
        tower = VisionTower(backbone=dict(type="CLIP"), vft=method())
        assert tower(torch.zeros(2, 3, 336, 336)).shape == (2, 576, 1024)
    assert sum(p.numel() for p in trained(tower).values()) == count
