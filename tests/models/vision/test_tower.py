"""The vision tower: pixels, modes, connector, method."""

import pytest
import torch
from torch import nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from covft.models.vision import CLIP, DropPath, InternViT, VisionTower


class Frozen:
    needs_context = False

    def apply(self, tower):
        tower.backbone.requires_grad_(False)


class TrainLastBlock(Frozen):
    def apply(self, tower):
        super().apply(tower)
        tower.backbone.blocks[-1].requires_grad_(True)


class Connector(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.drop = nn.Dropout(0.5)

    def forward(self, features, context):
        return self.linear(features) + context[:, None]


class FrozenWithConnector(Frozen):
    needs_context = True

    def apply(self, tower):
        super().apply(tower)
        return Connector(tower.context_dim)


def _tower(tiny, vft=Frozen, backbone=None, **options):
    backbone = {"type": CLIP, "arch": tiny, **(backbone or {})}
    return VisionTower(backbone=backbone, vft={"type": vft}, **options)


def test_uint8_is_normalised_as_transformers_does(tiny):
    tower = _tower(tiny)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    expected = processor([image.permute(1, 2, 0).numpy() for image in images], return_tensors="pt")
    normalised = expected["pixel_values"].float()
    torch.testing.assert_close(tower(images), tower(normalised), atol=1e-6, rtol=1e-5)
    assert torch.equal(tower(normalised), tower.backbone(normalised))


def test_mean_and_std_stay_float32_and_survive_the_meta_device(tiny):
    tower = _tower(tiny)
    mean, std = tower.mean.clone(), tower.std.clone()
    assert mean.flatten().tolist() == pytest.approx(CLIP.mean)
    tower.bfloat16()
    assert torch.equal(tower.mean, mean)
    assert torch.equal(tower.std, std)
    assert tower(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).dtype == torch.bfloat16
    assert not any(name in ("mean", "std") for name in tower.state_dict())

    with torch.device("meta"):
        meta = _tower(tiny)
    assert meta.mean.is_meta
    meta.to_empty(device="cpu")
    assert torch.equal(meta.mean, mean)
    assert torch.equal(meta.std, std)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(2, 3, 24, 24), r"\(images, 3, 32, 32\), got \(2, 3, 24, 24\)"),
        (torch.zeros(3, 32, 32), r"got \(3, 32, 32\)"),
        (torch.zeros(1, 32, 32, 3), r"got \(1, 32, 32, 3\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), "got torch.int64"),
    ],
)
def test_pixels_of_another_shape_or_type(pixels, message, tiny):
    with pytest.raises(ValueError, match=message):
        _tower(tiny)(pixels)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_empty_batch_keeps_the_parameters_in_the_graph(checkpointing, tiny):
    tower = _tower(tiny, TrainLastBlock, {"checkpointing": checkpointing})
    out = tower(torch.zeros(0, 3, 32, 32, dtype=torch.uint8))
    assert out.shape == (0, 16, 32)
    out.sum().backward()
    for parameter in tower.backbone.blocks[-1].parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_a_frozen_encoder_stays_in_evaluation(tiny, pixels):
    backbone = {"type": InternViT, "drop_path": 0.9}
    frozen = _tower(tiny, Frozen, backbone)
    assert frozen.training
    assert not any(module.training for module in frozen.backbone.modules())
    assert torch.equal(frozen(pixels), frozen.train()(pixels))
    assert any(isinstance(module, DropPath) for module in frozen.modules())

    partly = _tower(tiny, TrainLastBlock, backbone)
    assert not any(module.training for module in partly.eval().backbone.modules())
    assert partly.train().backbone.training
    # DropPath acts where pretrained weights train, and nowhere else.
    *frozen_blocks, last = partly.backbone.blocks
    assert last.drop_path.training
    assert not any(block.drop_path.training for block in frozen_blocks)


def test_a_connector_gets_features_and_context(tiny, pixels):
    tower = _tower(tiny, FrozenWithConnector, context_dim=32)
    context = torch.randn(2, 32)
    expected = tower.connector.linear(tower.backbone(pixels)) + context[:, None]
    assert torch.equal(tower(pixels, context), expected)
    assert tower.needs_context
    assert tower.connector.drop.training
    assert not tower.backbone.training


def test_context_reaches_the_blocks(tiny, pixels):
    class ScaleMLP(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.mlp = mlp

        def forward(self, x, context):
            return self.mlp(x, context) * context[:, None, None]

    tower = _tower(tiny, backbone={"checkpointing": True}).train()
    plain = tower(pixels)
    block = tower.backbone.blocks[0]
    block.mlp = ScaleMLP(block.mlp)
    torch.testing.assert_close(tower(pixels, torch.ones(2)), plain)
    changed = tower(pixels, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(changed[0], plain[0])
    assert not torch.allclose(changed[1], plain[1])


def test_select_layer_is_handed_on(tiny):
    assert len(_tower(tiny).backbone.blocks) == 2
    assert len(_tower(tiny, select_layer=-1).backbone.blocks) == 3
    built = CLIP(arch=tiny)
    method = Frozen()
    tower = VisionTower(backbone=built, vft=method)
    assert tower.backbone is built
    assert tower.vft is method
    assert (tower.num_tokens, tower.hidden_dim, tower.needs_context) == (16, 32, False)
    with pytest.raises(ValueError, match="no effect on an encoder that is already built"):
        VisionTower(backbone=built, vft=method, select_layer=-1)


def test_the_callers_config_is_left_alone(tiny):
    backbone = {"type": "CLIP", "arch": tiny}
    VisionTower(backbone=backbone, vft={"type": Frozen}, select_layer=1)
    assert backbone == {"type": "CLIP", "arch": tiny}
