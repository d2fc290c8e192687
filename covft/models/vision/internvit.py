"""InternViT (Chen et al., CVPR 2024): the encoder of InternVL2."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from covft.models.vision.backbone import Variant, VisionBackbone
from covft.models.vision.image_spec import IMAGENET_MEAN, IMAGENET_STD
from covft.models.vision.layout import CheckpointLayout
from covft.models.vision.vit import ViTConfig
from covft.registry import VISION_BACKBONES

_300M = ViTConfig(
    image_size=448,
    patch_size=14,
    hidden_dim=1024,
    depth=24,
    num_heads=16,
    mlp_dim=4096,
    layer_scale=0.1,
)
_FUSED = re.compile(r"(.*encoder\.layers\.\d+\.attn\.)qkv\.(weight|bias)")


@VISION_BACKBONES.register_module()
class InternViT(VisionBackbone):
    """InternViT-300M; InternVL2 reads the last block's raw output."""

    variants = {  # noqa: RUF012
        "300m-448": Variant("OpenGVLab/InternViT-300M-448px", _300M),
        "300m-448-v2.5": Variant("OpenGVLab/InternViT-300M-448px-V2_5", _300M),
    }
    default_select_layer = -1
    mean = IMAGENET_MEAN
    std = IMAGENET_STD
    resize = "stretch"
    model_types = ("intern_vit_6b", "internvl_vision", "internvl_chat", "internvl")
    config_keys = {  # noqa: RUF012
        "image_size": ("image_size", 448),
        "patch_size": ("patch_size", 14),
        "hidden_dim": ("hidden_size", 1024),
        "depth": ("num_hidden_layers", 24),
        "num_heads": ("num_attention_heads", 16),
        "mlp_dim": ("intermediate_size", 4096),
        "act": ("hidden_act", "gelu"),
        "norm_eps": ("layer_norm_eps", 1e-6),
    }
    config_required = {  # noqa: RUF012
        "num_channels": 3,
        "norm_type": "layer_norm",
        "qk_normalization": False,
        "use_qk_norm": False,
        "use_absolute_position_embeddings": True,
    }
    # transformers' names first, then those of OpenGVLab's own checkpoints.
    layout = CheckpointLayout(
        names={
            "patch_embed": ("embeddings.patch_embeddings.projection", "embeddings.patch_embedding"),
            "cls_token": ("embeddings.cls_token", "embeddings.class_embedding"),
            "pos_embed": ("embeddings.position_embeddings", "embeddings.position_embedding"),
            "blocks.*.norm1": ("encoder.layer.*.layernorm_before", "encoder.layers.*.norm1"),
            "blocks.*.attn.q_proj": (
                "encoder.layer.*.attention.q_proj",
                "encoder.layers.*.attn.q_proj",
            ),
            "blocks.*.attn.k_proj": (
                "encoder.layer.*.attention.k_proj",
                "encoder.layers.*.attn.k_proj",
            ),
            "blocks.*.attn.v_proj": (
                "encoder.layer.*.attention.v_proj",
                "encoder.layers.*.attn.v_proj",
            ),
            "blocks.*.attn.out_proj": (
                "encoder.layer.*.attention.projection_layer",
                "encoder.layers.*.attn.proj",
            ),
            "blocks.*.ls1.gamma": ("encoder.layer.*.lambda_1", "encoder.layers.*.ls1"),
            "blocks.*.norm2": ("encoder.layer.*.layernorm_after", "encoder.layers.*.norm2"),
            "blocks.*.mlp.fc1": ("encoder.layer.*.mlp.fc1", "encoder.layers.*.mlp.fc1"),
            "blocks.*.mlp.fc2": ("encoder.layer.*.mlp.fc2", "encoder.layers.*.mlp.fc2"),
            "blocks.*.ls2.gamma": ("encoder.layer.*.lambda_2", "encoder.layers.*.ls2"),
            "final_norm": ("layernorm",),
        },
        ignored=(r"embeddings\.mask_token",),
    )

    def import_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename a public checkpoint; OpenGVLab's fused query-key-value is split first."""
        return super().import_state_dict(_split_qkv(state))

    @classmethod
    def fields_from_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Read the fields; OpenGVLab calls the projections' bias ``qkv_bias``."""
        vision = config.get("vision_config", config)
        bias = vision.get("qkv_bias", vision.get("attention_bias", False))
        return {**super().fields_from_config(config), "qkv_bias": bias}


def _split_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    split: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match = _FUSED.fullmatch(key)
        if match is None:
            split[key] = tensor
            continue
        for name, part in zip("qkv", tensor.chunk(3, dim=0), strict=True):
            split[f"{match[1]}{name}_proj.{match[2]}"] = part
    return split
