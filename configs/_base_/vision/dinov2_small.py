"""DINOv2 ViT-S/14 up to its ninth block, on 6 x 6 patches (84 px): enough for one shape."""

from covft.models import DINOv2

vision_backbone = dict(type=DINOv2, weights="pretrained", grid=6, select_layer=9)
