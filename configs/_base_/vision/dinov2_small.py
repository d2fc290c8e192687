"""DINOv2 ViT-S/14; 112 px give 64 features, enough for pictures of one shape."""

from covft.models import DINOv2

vision_backbone = dict(type=DINOv2, weights="pretrained", image_size=112)
