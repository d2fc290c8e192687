"""CLIP's image encoder (Radford et al., ICML 2021): the encoder of LLaVA-1.5."""

from __future__ import annotations

from covft.models.vision.backbone import Variant, VisionBackbone
from covft.models.vision.image_spec import CLIP_MEAN, CLIP_STD
from covft.models.vision.layout import CheckpointLayout
from covft.models.vision.vit import ViTConfig
from covft.registry import VISION_BACKBONES


def _config(
    image_size: int, patch_size: int, hidden_dim: int, depth: int, num_heads: int
) -> ViTConfig:
    # QuickGELU, not GELU: the published weights were trained with it.
    return ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_dim=hidden_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_dim=4 * hidden_dim,
        act="quick_gelu",
        norm_eps=1e-5,
        patch_bias=False,
        pre_norm=True,
    )


@VISION_BACKBONES.register_module()
class CLIP(VisionBackbone):
    """CLIP ViT; LLaVA reads its next-to-last block."""

    variants = {  # noqa: RUF012
        "large-patch14-336": Variant(
            "openai/clip-vit-large-patch14-336", _config(336, 14, 1024, 24, 16)
        ),
        "large-patch14": Variant("openai/clip-vit-large-patch14", _config(224, 14, 1024, 24, 16)),
        "base-patch16": Variant("openai/clip-vit-base-patch16", _config(224, 16, 768, 12, 12)),
        "base-patch32": Variant("openai/clip-vit-base-patch32", _config(224, 32, 768, 12, 12)),
    }
    mean = CLIP_MEAN
    std = CLIP_STD
    resize = "crop"
    model_types = ("clip_vision_model", "clip")
    config_keys = {  # noqa: RUF012
        "image_size": ("image_size", 224),
        "patch_size": ("patch_size", 32),
        "hidden_dim": ("hidden_size", 768),
        "depth": ("num_hidden_layers", 12),
        "num_heads": ("num_attention_heads", 12),
        "mlp_dim": ("intermediate_size", 3072),
        "act": ("hidden_act", "quick_gelu"),
        "norm_eps": ("layer_norm_eps", 1e-5),
    }
    layout = CheckpointLayout(
        names={
            "patch_embed": ("embeddings.patch_embedding",),
            "cls_token": ("embeddings.class_embedding",),
            "pos_embed": ("embeddings.position_embedding.weight",),
            "pre_norm": ("pre_layrnorm",),
            "blocks.*.norm1": ("encoder.layers.*.layer_norm1",),
            "blocks.*.attn.q_proj": ("encoder.layers.*.self_attn.q_proj",),
            "blocks.*.attn.k_proj": ("encoder.layers.*.self_attn.k_proj",),
            "blocks.*.attn.v_proj": ("encoder.layers.*.self_attn.v_proj",),
            "blocks.*.attn.out_proj": ("encoder.layers.*.self_attn.out_proj",),
            "blocks.*.norm2": ("encoder.layers.*.layer_norm2",),
            "blocks.*.mlp.fc1": ("encoder.layers.*.mlp.fc1",),
            "blocks.*.mlp.fc2": ("encoder.layers.*.mlp.fc2",),
            "final_norm": ("post_layernorm",),
        },
        prefix="vision_model.",
        ignored=(r"embeddings\.position_ids",),
        leading_ones={"cls_token": 2, "pos_embed": 1},
    )
