"""DINOv3 ViT (Siméoni et al., 2025, arXiv:2508.10104)."""

from __future__ import annotations

from covft.models.vision.backbone import Variant, VisionBackbone
from covft.models.vision.image_spec import IMAGENET_MEAN, IMAGENET_STD
from covft.models.vision.layout import CheckpointLayout
from covft.models.vision.vit import ViTConfig
from covft.registry import VISION_BACKBONES


def _config(hidden_dim: int, depth: int, num_heads: int) -> ViTConfig:
    return ViTConfig(
        image_size=384,
        patch_size=16,
        hidden_dim=hidden_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_dim=4 * hidden_dim,
        norm_eps=1e-5,
        num_registers=4,
        pos_embed="rope",
        k_bias=False,
        layer_scale=1.0,
    )


@VISION_BACKBONES.register_module()
class DINOv3(VisionBackbone):
    """DINOv3 ViT, at 384 px by default (576 tokens, as many as CLIP-L/14 at 336 px).

    The rotary positions fit any size, so the size in a checkpoint's config.json isn't a property of
    the weights and isn't read: ``image_size`` (or ``arch``) alone sets it.
    """

    variants = {  # noqa: RUF012
        "large-patch16": Variant("facebook/dinov3-vitl16-pretrain-lvd1689m", _config(1024, 24, 16)),
        "base-patch16": Variant("facebook/dinov3-vitb16-pretrain-lvd1689m", _config(768, 12, 12)),
        "small-patch16": Variant("facebook/dinov3-vits16-pretrain-lvd1689m", _config(384, 12, 6)),
    }
    mean = IMAGENET_MEAN
    std = IMAGENET_STD
    resize = "stretch"
    model_types = ("dinov3_vit",)
    config_keys = {  # noqa: RUF012
        "patch_size": ("patch_size", 16),
        "hidden_dim": ("hidden_size", 384),
        "depth": ("num_hidden_layers", 12),
        "num_heads": ("num_attention_heads", 6),
        "mlp_dim": ("intermediate_size", 1536),
        "act": ("hidden_act", "gelu"),
        "norm_eps": ("layer_norm_eps", 1e-5),
        "num_registers": ("num_register_tokens", 0),
        "qkv_bias": ("query_bias", True),
        "k_bias": ("key_bias", False),
        "rope_theta": ("rope_theta", 100.0),
    }
    config_required = {  # noqa: RUF012
        "num_channels": 3,
        "use_gated_mlp": False,
        "mlp_bias": True,
        "proj_bias": True,
        "value_bias": True,
        "query_bias": True,
    }
    # The hub's names first; transformers 5 has model.layer in memory.
    layout = CheckpointLayout(
        names={
            "patch_embed": ("embeddings.patch_embeddings",),
            "cls_token": ("embeddings.cls_token",),
            "register_tokens": ("embeddings.register_tokens",),
            "blocks.*.norm1": ("layer.*.norm1", "model.layer.*.norm1"),
            "blocks.*.attn.q_proj": ("layer.*.attention.q_proj", "model.layer.*.attention.q_proj"),
            "blocks.*.attn.k_proj": ("layer.*.attention.k_proj", "model.layer.*.attention.k_proj"),
            "blocks.*.attn.v_proj": ("layer.*.attention.v_proj", "model.layer.*.attention.v_proj"),
            "blocks.*.attn.out_proj": (
                "layer.*.attention.o_proj",
                "model.layer.*.attention.o_proj",
            ),
            "blocks.*.ls1.gamma": (
                "layer.*.layer_scale1.lambda1",
                "model.layer.*.layer_scale1.lambda1",
            ),
            "blocks.*.norm2": ("layer.*.norm2", "model.layer.*.norm2"),
            "blocks.*.mlp.fc1": ("layer.*.mlp.up_proj", "model.layer.*.mlp.up_proj"),
            "blocks.*.mlp.fc2": ("layer.*.mlp.down_proj", "model.layer.*.mlp.down_proj"),
            "blocks.*.ls2.gamma": (
                "layer.*.layer_scale2.lambda1",
                "model.layer.*.layer_scale2.lambda1",
            ),
            "final_norm": ("norm",),
        },
        ignored=(r"embeddings\.mask_token", r"rope_embeddings\..+"),
    )
