"""Tiny random encoders of every family, ours and transformers'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from covft.models.vision import CLIP, DINOv2, DINOv3, InternViT, SigLIP, VisionBackbone

TINY = {
    "hidden_dim": 32,
    "depth": 3,
    "num_heads": 4,
    "mlp_dim": 64,
    "patch_size": 8,
    "image_size": 32,
}


@dataclass(frozen=True)
class Family:
    """One encoder family, and how transformers builds its tiny counterpart."""

    ours: type[VisionBackbone]
    model: Callable[[Any], nn.Module]
    config: Callable[..., Any]
    settings: dict[str, Any] = field(default_factory=dict)
    num_prefix: int = 1

    def reference(self, seed: int = 0, **settings: Any) -> nn.Module:
        """Return transformers' model with every parameter random, layer scales included."""
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "patch_size": 8,
            "image_size": 32,
        }
        model = self.model(self.config(**{**sizes, **self.settings, **settings})).eval()
        randomise(model, seed)
        return model

    def save(self, folder: Path, **settings: Any) -> nn.Module:
        """Save a reference model as a checkpoint folder and return it."""
        model = self.reference(**settings)
        model.save_pretrained(folder)
        return model

    def load(self, folder: Path, **options: Any) -> VisionBackbone:
        """Load a folder with the tiny image size (DINOv3 doesn't read it from config.json)."""
        return self.ours(**{"weights": str(folder), "image_size": 32, **options})


FAMILIES = {
    "CLIP": Family(CLIP, CLIPVisionModel, CLIPVisionConfig, {"intermediate_size": 64}),
    "SigLIP": Family(
        SigLIP, SiglipVisionModel, SiglipVisionConfig, {"intermediate_size": 64}, num_prefix=0
    ),
    "DINOv2": Family(DINOv2, Dinov2Model, Dinov2Config, {"mlp_ratio": 2}),
    "DINOv3": Family(
        DINOv3,
        DINOv3ViTModel,
        DINOv3ViTConfig,
        {"intermediate_size": 64, "num_register_tokens": 4},
        num_prefix=5,
    ),
    "InternViT": Family(
        InternViT,
        InternVLVisionModel,
        InternVLVisionConfig,
        {"intermediate_size": 64, "attention_bias": True, "use_mask_token": True},
    ),
}


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def families() -> dict[str, Family]:
    return FAMILIES


@pytest.fixture
def tiny() -> dict[str, int]:
    return dict(TINY)


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        if parameter.dim() == 1:
            parameter.add_(0.5)
