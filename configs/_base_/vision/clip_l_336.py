"""CLIP ViT-L/14 at 336 px: 576 tokens, LLaVA-1.5's encoder."""

from covft.models import CLIP

vision_backbone = dict(type=CLIP, weights="pretrained")
