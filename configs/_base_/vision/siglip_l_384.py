"""SigLIP ViT-L/16 at 384 px: 576 tokens."""

from covft.models import SigLIP

vision_backbone = dict(type=SigLIP, weights="pretrained")
