"""SigLIP's image encoder (Zhai et al., ICCV 2023)."""

from __future__ import annotations

from covft.models.vision.backbone import Variant, VisionBackbone
from covft.models.vision.image_spec import HALF
from covft.models.vision.layout import CheckpointLayout
from covft.models.vision.vit import ViTConfig
from covft.registry import VISION_BACKBONES


def _config(
    image_size: int, patch_size: int, hidden_dim: int, depth: int, num_heads: int, mlp_dim: int
) -> ViTConfig:
    # No CLS token: SigLIP pools by attention, in a head that the MLLM doesn't read.
    return ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_dim=hidden_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_dim=mlp_dim,
        act="gelu_tanh",
        use_cls=False,
    )


@VISION_BACKBONES.register_module()
class SigLIP(VisionBackbone):
    """SigLIP ViT; the next-to-last block is read, as for CLIP."""

    variants = {  # noqa: RUF012
        "large-patch16-384": Variant(
            "google/siglip-large-patch16-384", _config(384, 16, 1024, 24, 16, 4096)
        ),
        "large-patch16-256": Variant(
            "google/siglip-large-patch16-256", _config(256, 16, 1024, 24, 16, 4096)
        ),
        "base-patch16-224": Variant(
            "google/siglip-base-patch16-224", _config(224, 16, 768, 12, 12, 3072)
        ),
        "so400m-patch14-384": Variant(
            "google/siglip-so400m-patch14-384", _config(384, 14, 1152, 27, 16, 4304)
        ),
    }
    mean = HALF
    std = HALF
    resize = "stretch"
    model_types = ("siglip_vision_model", "siglip")
    config_keys = {  # noqa: RUF012
        "image_size": ("image_size", 224),
        "patch_size": ("patch_size", 16),
        "hidden_dim": ("hidden_size", 768),
        "depth": ("num_hidden_layers", 12),
        "num_heads": ("num_attention_heads", 12),
        "mlp_dim": ("intermediate_size", 3072),
        "act": ("hidden_act", "gelu_pytorch_tanh"),
        "norm_eps": ("layer_norm_eps", 1e-6),
    }
    layout = CheckpointLayout(
        names={
            "patch_embed": ("embeddings.patch_embedding",),
            "pos_embed": ("embeddings.position_embedding.weight",),
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
        ignored=(r"embeddings\.position_ids", r"head\..+"),
        leading_ones={"pos_embed": 1},
    )
