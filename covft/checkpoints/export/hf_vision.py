"""A tuned plain encoder as a vision model of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from covft.models.vision.backbone import VisionBackbone
from covft.models.vision.clip import CLIP
from covft.models.vision.dinov2 import DINOv2
from covft.models.vision.pretrained import read_tensors
from covft.models.vision.siglip import SigLIP
from covft.models.vision.vit import ViT

_ACTS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
#: transformers' model type, and fields that leave out what the MLLM doesn't read.
_KINDS: dict[type[VisionBackbone], dict[str, Any]] = {
    CLIP: {"model_type": "clip_vision_model"},
    SigLIP: {"model_type": "siglip_vision_model", "vision_use_head": False},
    DINOv2: {"model_type": "dinov2", "use_mask_token": False},
}


@dataclass(frozen=True)
class PublicVision:
    """An encoder's config and what our model doesn't build of it.

    Attributes:
        config: transformers' vision config.
        rest: Public names and weights of the blocks after the selected one and the last norm.
        layer: Index of the selected hidden state.
    """

    config: dict[str, Any]
    rest: dict[str, Tensor]
    layer: int


def public_vision(backbone: VisionBackbone) -> PublicVision:
    """Return what a folder needs beside the encoder's own weights.

    Blocks after the selected one are never trained, so those of a pretrained encoder are its
    source's, and the published depth stays. An encoder with random weights has none: its config
    gets the depth that is there, since any other blocks would be made up.

    Raises:
        ValueError: If LLaVA in transformers can't read such an encoder.
    """
    kind = next((kind for kind in _KINDS if isinstance(backbone, kind)), None)
    if kind is None:
        known = ", ".join(kind.__name__ for kind in _KINDS)
        raise ValueError(
            f"--to hf-llava: LLaVA in transformers drops no prefix tokens but one CLS, and "
            f"{type(backbone).__name__} isn't one of {known}; use --to hf"
        )
    if isinstance(backbone.final_norm, torch.nn.LayerNorm):
        raise ValueError(
            "--to hf-llava: LLaVA in transformers reads hidden states before the last norm, but "
            "the model was trained with final_norm=True; use --to hf"
        )
    tail = _pretrained_tail(backbone)
    rest = backbone.layout.to_public(_neutral_norm(backbone) if tail is None else tail)
    if tail is None:
        depth = layer = backbone.select_layer
    else:
        depth, layer = backbone.config.depth, published_layer(backbone)
    return PublicVision({**_KINDS[kind], **published_fields(backbone, depth=depth)}, rest, layer)


def published_layer(backbone: VisionBackbone) -> int:
    """Return the hidden state that is read, counted from the end of the published encoder."""
    return backbone.select_layer - backbone.config.depth - 1


def published_fields(backbone: VisionBackbone, *, depth: int) -> dict[str, Any]:
    """Return the architecture in the words of the family's config.json, with that many blocks."""
    config = backbone.config
    fields = {public: getattr(config, ours) for ours, (public, _) in backbone.config_keys.items()}
    fields["num_hidden_layers"] = depth
    fields["hidden_act"] = _ACTS[config.act]
    if "mlp_ratio" in fields:
        fields["mlp_ratio"] = config.mlp_dim // config.hidden_dim
    return fields


def _pretrained_tail(backbone: VisionBackbone) -> dict[str, Tensor] | None:
    """Return the unbuilt weights of the encoder's source under our names, None without one."""
    if backbone.weights_folder is None:
        return None
    with torch.device("meta"):
        whole = ViT(backbone.config, final_norm=True).state_dict()
        built = ViT(backbone.config, select_layer=backbone.select_layer).state_dict()
    found, _ = backbone.layout.to_ours(read_tensors(backbone.weights_folder))
    return {name: found[name] for name in whole if name not in built}


def _neutral_norm(backbone: VisionBackbone) -> dict[str, Tensor]:
    """Return a last norm that transformers builds and LLaVA never reads."""
    weight = backbone.patch_embed.weight
    dim = backbone.hidden_dim
    return {
        "final_norm.weight": weight.new_ones(dim, device="cpu"),
        "final_norm.bias": weight.new_zeros(dim, device="cpu"),
    }
