"""DINOv2 ViT-S/14; a grid of 8 x 8 patches (112 px) is enough for pictures of one shape."""

from covft.models import DINOv2

vision_backbone = dict(type=DINOv2, weights="pretrained", grid=8)
