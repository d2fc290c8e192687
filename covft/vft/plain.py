"""Freeze and Full: the two methods that add nothing to the encoder."""

from __future__ import annotations

from covft.models.vision.tower import VisionTower
from covft.registry import VFT
from covft.vft.base import VFTMethod


@VFT.register_module()
class Freeze(VFTMethod):
    """Leave the encoder as it is (LLaVA-1.5)."""

    def apply(self, tower: VisionTower) -> None:
        """Keep every parameter frozen."""
        tower.backbone.requires_grad_(False)


@VFT.register_module()
class Full(VFTMethod):
    """Train every parameter of the blocks that the MLLM consumes (InternVL, Qwen-VL)."""

    def apply(self, tower: VisionTower) -> None:
        """Make every parameter trainable."""
        tower.backbone.requires_grad_(True)
