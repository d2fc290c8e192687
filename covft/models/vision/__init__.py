"""Vision encoders: one ViT, five families, and the tower that a method is applied to."""

from covft.models.vision.backbone import VisionBackbone
from covft.models.vision.clip import CLIP
from covft.models.vision.dinov2 import DINOv2
from covft.models.vision.dinov3 import DINOv3
from covft.models.vision.image_spec import ImageSpec
from covft.models.vision.internvit import InternViT
from covft.models.vision.siglip import SigLIP
from covft.models.vision.tower import VisionTower
from covft.models.vision.vit import MLP, Attention, Block, DropPath, LayerScale, ViT, ViTConfig

__all__ = [
    "CLIP",
    "MLP",
    "Attention",
    "Block",
    "DINOv2",
    "DINOv3",
    "DropPath",
    "ImageSpec",
    "InternViT",
    "LayerScale",
    "SigLIP",
    "ViT",
    "ViTConfig",
    "VisionBackbone",
    "VisionTower",
]
