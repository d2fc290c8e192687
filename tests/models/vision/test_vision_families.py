"""Every family equals transformers' class, and its full-size variants have the published shapes."""

import dataclasses

import pytest
import torch
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from covft.models.vision import CLIP, DINOv2, DINOv3, InternViT, SigLIP
from covft.registry import VISION_BACKBONES

ALL = [CLIP, SigLIP, DINOv2, DINOv3, InternViT]


def _tolerance(family):
    # transformers makes DINOv3's angles in float32, also in a float64 model.
    return {"atol": 2e-6, "rtol": 2e-5} if family.ours is DINOv3 else {"atol": 1e-10, "rtol": 1e-9}


@pytest.mark.parametrize("select_layer", [None, -1, 1])
def test_hidden_states_and_all_gradients_equal_transformers(family, select_layer, pixels, tmp_path):
    reference = family.save(tmp_path).double()
    ours = family.load(tmp_path, select_layer=select_layer).double()
    layer = (family.ours.default_select_layer if select_layer is None else select_layer) % 4
    pixels = pixels.double()

    expected = reference(pixels, output_hidden_states=True).hidden_states[layer]
    expected = expected[:, family.num_prefix :]
    found = ours(pixels)
    torch.testing.assert_close(found, expected, **_tolerance(family))
    assert found.shape == (2, 16, 32)
    assert len(ours.blocks) == layer

    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    gradients = ours.import_state_dict(
        {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in reference.named_parameters()
        }
    )
    own = dict(ours.named_parameters())
    assert set(gradients) == set(own)
    for name, parameter in own.items():
        assert parameter.grad.abs().max() > 0 or "k_proj.bias" in name, name
        torch.testing.assert_close(
            parameter.grad, gradients[name], **_tolerance(family), msg=lambda m, n=name: f"{n}: {m}"
        )


def test_final_norm_equals_the_last_hidden_state(family, pixels, tmp_path):
    # InternViT has a final norm only where it isn't pooled by the mean.
    settings = {"use_mean_pooling": False} if family.ours is InternViT else {}
    reference = family.save(tmp_path, **settings)
    ours = family.load(tmp_path, select_layer=-1, final_norm=True)
    with torch.no_grad():
        expected = reference(pixels).last_hidden_state
        if family.ours is CLIP:  # transformers normalises the CLS token alone
            expected = reference.post_layernorm(expected)
        expected = expected[:, family.num_prefix :]
        torch.testing.assert_close(ours(pixels), expected, atol=1e-5, rtol=1e-5)


def test_dinov3_does_not_jitter_in_training(families, pixels, tmp_path):
    families["DINOv3"].save(tmp_path)
    ours = families["DINOv3"].load(tmp_path)
    with torch.no_grad():
        assert torch.equal(ours.eval()(pixels), ours.train()(pixels))


def test_dinov3_rotates_in_the_weights_precision(families, pixels, tmp_path):
    reference = families["DINOv3"].save(tmp_path).bfloat16()
    ours = families["DINOv3"].load(tmp_path, select_layer=-1).bfloat16()
    with torch.no_grad():
        expected = reference(pixels.bfloat16(), output_hidden_states=True).hidden_states[-1][:, 5:]
        found = ours(pixels)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.02)


@pytest.mark.parametrize(
    ("ours", "arch", "num_tokens", "blocks", "hidden_dim"),
    [
        (CLIP, None, 576, 23, 1024),
        (CLIP, "base-patch32", 49, 11, 768),
        (SigLIP, None, 576, 23, 1024),
        (SigLIP, "so400m-patch14-384", 729, 26, 1152),
        (DINOv2, None, 1369, 11, 384),
        (DINOv3, None, 576, 23, 1024),
        (InternViT, None, 1024, 24, 1024),
    ],
)
def test_full_size_variants_build_on_the_meta_device(ours, arch, num_tokens, blocks, hidden_dim):
    with torch.device("meta"):
        backbone = ours(arch=arch)
        out = backbone(torch.empty(2, 3, *2 * [backbone.image_spec.image_size]))
    assert all(parameter.is_meta for parameter in backbone.parameters())
    assert not list(backbone.buffers())
    assert out.shape == (2, num_tokens, hidden_dim)
    assert (backbone.num_tokens, backbone.hidden_dim) == (num_tokens, hidden_dim)
    assert len(backbone.blocks) == blocks


@pytest.mark.parametrize(
    ("ours", "millions"),
    # Published parameter counts of the encoders (heads and mask tokens excluded).
    [(CLIP, 303.5), (SigLIP, 303.7), (DINOv2, 22.06), (DINOv3, 303.1), (InternViT, 304.0)],
)
def test_full_size_parameter_counts(ours, millions):
    with torch.device("meta"):
        backbone = ours(select_layer=-1)
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)


@pytest.mark.parametrize("ours", ALL)
def test_one_tiny_arch_fits_every_family(ours, tiny, pixels):
    backbone = VISION_BACKBONES.build({"type": ours.__name__, "arch": tiny})
    assert type(backbone) is ours
    assert backbone(pixels).shape == (2, 16, 32)
    assert backbone.hub_id is None
    norms = [n for n, p in backbone.named_parameters() if "norm" in n and n.endswith("weight")]
    for name, parameter in backbone.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0
        elif name in norms or name.endswith("gamma"):
            assert parameter.unique().numel() == 1
        else:
            assert 0.01 < parameter.std() < 0.03, name


@pytest.mark.parametrize(
    ("ours", "hub_id"),
    [
        (CLIP, "openai/clip-vit-large-patch14-336"),
        (SigLIP, "google/siglip-large-patch16-384"),
        (DINOv2, "facebook/dinov2-small"),
        (DINOv3, "facebook/dinov3-vitl16-pretrain-lvd1689m"),
        (InternViT, "OpenGVLab/InternViT-300M-448px"),
    ],
)
def test_default_variants_name_their_weights(ours, hub_id):
    with torch.device("meta"):
        assert ours().hub_id == hub_id


LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
PUBLISHED = [  # what the hub's config.json says, as far as the architecture goes
    (
        CLIP,
        {
            "model_type": "clip",
            "vision_config": {
                **LARGE,
                "model_type": "clip_vision_model",
                "image_size": 336,
                "patch_size": 14,
                "hidden_act": "quick_gelu",
                "layer_norm_eps": 1e-05,
            },
        },
    ),
    (
        SigLIP,
        {
            "model_type": "siglip",
            "vision_config": {**LARGE, "model_type": "siglip_vision_model", "image_size": 384},
        },
    ),
    (
        DINOv2,
        {
            "model_type": "dinov2",
            "hidden_size": 384,
            "num_attention_heads": 6,
            "num_hidden_layers": 12,
            "mlp_ratio": 4,
            "image_size": 518,
            "patch_size": 14,
            "layer_norm_eps": 1e-06,
            "qkv_bias": True,
        },
    ),
    (
        DINOv3,
        {
            **LARGE,
            "model_type": "dinov3_vit",
            "image_size": 224,
            "patch_size": 16,
            "num_register_tokens": 4,
            "layer_norm_eps": 1e-05,
            "key_bias": False,
            "rope_theta": 100.0,
            "pos_embed_rescale": 2.0,
        },
    ),
    (
        InternViT,
        {
            **LARGE,
            "model_type": "intern_vit_6b",
            "image_size": 448,
            "patch_size": 14,
            "layer_norm_eps": 1e-06,
            "norm_type": "layer_norm",
            "qkv_bias": True,
            "qk_normalization": False,
        },
    ),
]


@pytest.mark.parametrize(("ours", "published"), PUBLISHED)
def test_default_variants_are_the_published_architectures(ours, published):
    with torch.device("meta"):
        config = dataclasses.asdict(ours().config)
    for name, value in ours.fields_from_config(published).items():
        assert config[name] == value, name


@pytest.mark.parametrize(
    ("ours", "size", "resize"),
    [
        (CLIP, 336, "crop"),
        (SigLIP, 384, "stretch"),
        (DINOv2, 518, "crop"),
        (DINOv3, 384, "stretch"),
        (InternViT, 448, "stretch"),
    ],
)
def test_image_spec(ours, size, resize):
    with torch.device("meta"):
        spec = ours().image_spec
    processor = {CLIP: CLIPImageProcessorPil, SigLIP: SiglipImageProcessorPil}.get(ours)
    mean = IMAGENET_DEFAULT_MEAN if processor is None else processor.image_mean
    std = IMAGENET_DEFAULT_STD if processor is None else processor.image_std
    assert (spec.image_size, spec.resize) == (size, resize)
    assert (list(spec.mean), list(spec.std)) == (list(mean), list(std))


def test_misspelt_arch_is_answered_with_the_nearest(tiny):
    with pytest.raises(ValueError, match=r"no variant 'large-patch14-366'.*'large-patch14-336'"):
        CLIP(arch="large-patch14-366")
    with pytest.raises(ValueError, match=r"no field 'hiden_dim'.*'hidden_dim'"):
        CLIP(arch={"hiden_dim": 32})
    with pytest.raises(
        ValueError, match=r"hidden_dim \(30\) must be a multiple of num_heads \(4\)"
    ):
        CLIP(arch={**tiny, "hidden_dim": 30})


def test_image_size_must_be_a_multiple_of_the_patch_size(tiny):
    with pytest.raises(ValueError, match=r"image_size \(34\).*patch_size \(8\); the nearest is 32"):
        CLIP(arch=tiny, image_size=34)
    with pytest.raises(ValueError, match=r"image_size \(34\)"):
        CLIP(arch={**tiny, "image_size": 34})
    assert DINOv3(arch=tiny, image_size=64).num_tokens == 64
