"""DINOv3 ViT-L/16 at 384 px: 576 tokens."""

from covft.models import DINOv3

vision_backbone = dict(type=DINOv3, weights="pretrained")
