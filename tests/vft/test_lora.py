import pytest
import torch
from miniature import ARCH as MINIATURE
from torch import Tensor, nn

from covft.models.vision.tower import VisionTower
from covft.vft.lora import LoRA, LoRALinear

ARCH = {**MINIATURE, "depth": 4}
FAMILIES = ["CLIP", "SigLIP", "DINOv2", "DINOv3", "InternViT"]


def make_backbone(family: str = "CLIP", **options) -> nn.Module:
    torch.manual_seed(0)
    backbone = VisionTower(backbone=dict(type=family, arch=ARCH, **options)).backbone
    randomise(backbone)
    return backbone


def make_tower(family: str = "CLIP", *, options=None, **vft) -> VisionTower:
    return VisionTower(backbone=make_backbone(family, **(options or {})), vft=LoRA(**vft))


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)


def pixels(images: int = 3) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(images, 3, 32, 32)


def trained(tower: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in tower.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_frozen_encoder_at_initialisation(family: str) -> None:
    backbone = make_backbone(family)
    expected = VisionTower(backbone=backbone)(pixels())
    tuned = VisionTower(backbone=backbone, vft=LoRA()).eval()
    assert isinstance(tuned.backbone.blocks[-1].attn.k_proj, LoRALinear)
    assert torch.equal(tuned(pixels()), expected)


def test_equals_the_formula_in_float64() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(6, 5).double(), rank=3, alpha=7.0, dropout=0.5).eval()
    randomise(layer)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    weight = layer.base.weight + 7 / 3 * layer.lora_b @ layer.lora_a
    torch.testing.assert_close(layer(x), x @ weight.T + layer.base.bias, rtol=1e-12, atol=1e-12)


def test_starts_as_a_linear_layer_starts_and_zero() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 48), rank=16, alpha=16.0, dropout=0.0)
    assert layer.lora_a.shape == (16, 64)
    assert 0.95 / 8 < layer.lora_a.abs().max() < 1 / 8  # U(-1 / sqrt(in), 1 / sqrt(in))
    assert torch.equal(layer.lora_b, torch.zeros(48, 16))
    assert not layer.base.weight.requires_grad
    assert not layer.base.bias.requires_grad


def test_first_gradient_reaches_b_only() -> None:
    tower = make_tower().train()
    tower(pixels()).square().sum().backward()
    for name, parameter in trained(tower).items():
        assert parameter.grad is not None, name
        assert parameter.grad.any() == name.endswith("lora_b"), name


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_updates_of_every_projection_train(family: str) -> None:
    tower = make_tower(family)
    expected = {
        f"backbone.blocks.{i}.attn.{projection}_proj.lora_{factor}"
        for i in range(len(tower.backbone.blocks))
        for projection in ("q", "k", "v", "out")
        for factor in "ab"
    }
    assert set(trained(tower)) == expected
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    optimizer = torch.optim.SGD(trained(tower).values(), lr=0.1)
    randomise(nn.ParameterList(trained(tower).values()))
    tower.train()(pixels()).square().sum().backward()
    optimizer.step()
    changed = {n for n, value in tower.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_equals_unmerged_in_a_plain_encoder(family: str) -> None:
    plain = VisionTower(backbone=dict(type=family, arch=ARCH)).double().eval()
    tower = make_tower(family, alpha=5.0).double().eval()
    frozen = tower(pixels().double())
    randomise(tower.backbone)

    merged = tower.vft.plain_state_dict(tower.backbone)
    assert list(merged) == list(plain.backbone.state_dict())
    plain.backbone.load_state_dict(plain.backbone.import_state_dict(tower.export_state_dict()))
    expected = tower(pixels().double())
    assert (expected - frozen).abs().max() > 1e-2
    torch.testing.assert_close(plain(pixels().double()), expected, rtol=1e-12, atol=1e-12)


def test_merging_rounds_once_and_keeps_the_type() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(32, 32).bfloat16(), rank=8, alpha=16.0, dropout=0.0)
    randomise(layer)
    update = layer.lora_b.double() @ layer.lora_a.double()
    expected = (layer.base.weight.double() + 2 * update).bfloat16()
    merged = layer.merged_weight()
    assert merged.dtype == torch.bfloat16
    assert not merged.requires_grad
    # A product rounded to bfloat16 first would differ in many elements, not just at float32 ties.
    assert (merged != expected).float().mean() < 0.01


def test_dropout_acts_in_training_only() -> None:
    tower = make_tower(dropout=0.5)
    randomise(nn.ParameterList(trained(tower).values()))
    images = pixels()
    tower.train()
    assert not torch.equal(tower(images), tower(images))
    tower.eval()
    assert torch.equal(tower(images), tower(images))


def test_frozen_blocks_keep_drop_path_off() -> None:
    tower = make_tower("InternViT", options={"drop_path": 0.9}, dropout=0.0)
    randomise(nn.ParameterList(trained(tower).values()))
    assert torch.equal(tower.train()(pixels()), tower.eval()(pixels()))


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_gives_equal_gradients(family: str) -> None:
    grads = []
    for checkpointing in (False, True):
        tower = make_tower(family, options={"checkpointing": checkpointing}, dropout=0.3).train()
        randomise(nn.ParameterList(trained(tower).values()))
        tower(pixels()).square().sum().backward()
        grads.append({name: p.grad for name, p in trained(tower).items()})
    for name, grad in grads[0].items():
        assert grad.any(), name
        assert torch.equal(grad, grads[1][name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_batch_gives_zero_gradients(family: str) -> None:
    tower = make_tower(family).train()
    tower(pixels(0)).sum().backward()
    for name, parameter in trained(tower).items():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_trains_in_bfloat16_autocast() -> None:
    tower = make_tower("DINOv3", dropout=0.0).eval()
    randomise(nn.ParameterList(trained(tower).values()))
    expected = tower(pixels())
    with torch.autocast("cpu", torch.bfloat16):
        features = tower(pixels())
    features.float().square().sum().backward()
    error = (features.float() - expected).norm() / expected.norm()
    assert error < 0.05
    assert all(p.grad.isfinite().all() and p.grad.any() for p in trained(tower).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"vft\.rank must be at least 1, got 0"),
        ({"alpha": 0.0}, r"vft\.alpha must be above 0, got 0\.0"),
        ({"dropout": 1.0}, r"vft\.dropout must be in \[0, 1\), got 1\.0"),
        ({"dropout": -0.1}, r"vft\.dropout must be in \[0, 1\), got -0\.1"),
    ],
)
def test_options_out_of_range_are_explained(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRA(**options)


@pytest.mark.parametrize(("rank", "millions"), [(8, 1.507328), (512, 96.468992)])
def test_full_size_counts(rank: int, millions: float) -> None:
    with torch.device("meta"):
        tower = VisionTower(backbone=dict(type="CLIP"), vft=LoRA(rank=rank))
        assert tower(torch.zeros(2, 3, 336, 336)).shape == (2, 576, 1024)
    assert sum(p.numel() for p in trained(tower).values()) / 1e6 == millions
