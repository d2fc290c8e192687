"""InternViT-300M at 448 px: 1024 features, 256 tokens after pixel shuffle."""

from covft.models import InternViT

vision_backbone = dict(type=InternViT, weights="pretrained")
