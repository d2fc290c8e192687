"""What an encoder expects of its pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Resize = Literal["crop", "stretch", "pad"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class ImageSpec:
    """The pixels that an encoder was trained on.

    Attributes:
        image_size: Side of the square input, in pixels.
        mean: Per-channel mean of RGB values in [0, 1].
        std: Per-channel standard deviation of RGB values in [0, 1].
        resize: How an image becomes a square: ``crop`` (shorter side resized, centre kept),
            ``stretch`` (both sides resized) or ``pad`` (padded to a square with the mean colour,
            then resized).
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Resize
