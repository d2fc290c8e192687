"""DINOv2 (Oquab et al., TMLR 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from covft.models.vision.backbone import Variant, VisionBackbone
from covft.models.vision.image_spec import IMAGENET_MEAN, IMAGENET_STD
from covft.models.vision.layout import CheckpointLayout
from covft.models.vision.vit import ViTConfig
from covft.registry import VISION_BACKBONES


def _config(hidden_dim: int, depth: int, num_heads: int) -> ViTConfig:
    return ViTConfig(
        image_size=518,
        patch_size=14,
        hidden_dim=hidden_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_dim=4 * hidden_dim,
        layer_scale=1.0,
    )


@VISION_BACKBONES.register_module()
class DINOv2(VisionBackbone):
    """DINOv2 ViT without registers; smaller images than 518 px are usual (``image_size``)."""

    variants = {  # noqa: RUF012
        "small-patch14": Variant("facebook/dinov2-small", _config(384, 12, 6)),
        "base-patch14": Variant("facebook/dinov2-base", _config(768, 12, 12)),
        "large-patch14": Variant("facebook/dinov2-large", _config(1024, 24, 16)),
    }
    mean = IMAGENET_MEAN
    std = IMAGENET_STD
    resize = "crop"
    model_types = ("dinov2",)
    config_keys = {  # noqa: RUF012
        "image_size": ("image_size", 224),
        "patch_size": ("patch_size", 14),
        "hidden_dim": ("hidden_size", 768),
        "depth": ("num_hidden_layers", 12),
        "num_heads": ("num_attention_heads", 12),
        "mlp_dim": ("mlp_ratio", 4),
        "act": ("hidden_act", "gelu"),
        "norm_eps": ("layer_norm_eps", 1e-6),
        "qkv_bias": ("qkv_bias", True),
    }
    config_required = {"num_channels": 3, "use_swiglu_ffn": False}  # noqa: RUF012
    # The hub's names first; transformers 5 has other names in memory.
    layout = CheckpointLayout(
        names={
            "patch_embed": ("embeddings.patch_embeddings.projection",),
            "cls_token": ("embeddings.cls_token",),
            "pos_embed": ("embeddings.position_embeddings",),
            "blocks.*.norm1": ("encoder.layer.*.norm1",),
            "blocks.*.attn.q_proj": (
                "encoder.layer.*.attention.attention.query",
                "encoder.layer.*.attention.q_proj",
            ),
            "blocks.*.attn.k_proj": (
                "encoder.layer.*.attention.attention.key",
                "encoder.layer.*.attention.k_proj",
            ),
            "blocks.*.attn.v_proj": (
                "encoder.layer.*.attention.attention.value",
                "encoder.layer.*.attention.v_proj",
            ),
            "blocks.*.attn.out_proj": (
                "encoder.layer.*.attention.output.dense",
                "encoder.layer.*.attention.o_proj",
            ),
            "blocks.*.ls1.gamma": ("encoder.layer.*.layer_scale1.lambda1",),
            "blocks.*.norm2": ("encoder.layer.*.norm2",),
            "blocks.*.mlp.fc1": ("encoder.layer.*.mlp.fc1",),
            "blocks.*.mlp.fc2": ("encoder.layer.*.mlp.fc2",),
            "blocks.*.ls2.gamma": ("encoder.layer.*.layer_scale2.lambda1",),
            "final_norm": ("layernorm",),
        },
        ignored=(r"embeddings\.mask_token",),
    )

    @classmethod
    def fields_from_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Read the fields; DINOv2 gives the MLP's width as a ratio."""
        found = super().fields_from_config(config)
        return {**found, "mlp_dim": int(found["hidden_dim"] * found["mlp_dim"])}
