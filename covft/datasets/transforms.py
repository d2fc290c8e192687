"""Images to the pixels that a vision encoder takes.

PIL resizes, since its antialiased bicubic filter is what the public encoders were trained and are
evaluated with; other libraries' differ by several grey levels.
"""

from __future__ import annotations

from typing import get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from covft.models.vision.image_spec import ImageSpec, Resize

RESIZES: tuple[str, ...] = get_args(Resize)


def transform(image: Image.Image, spec: ImageSpec, *, resize: str | None = None) -> Tensor:
    """Make an image the square that an encoder takes; for several, see :mod:`.tiling`.

    Args:
        image: RGB, of any size.
        spec: The encoder's pixels.
        resize: ``crop``, ``stretch`` or ``pad`` instead of the encoder's own way.

    Returns:
        Pixels, (3, S, S) uint8; the model normalises them.

    Raises:
        ValueError: If ``resize`` is unknown.
    """
    mode = spec.resize if resize is None else checked_resize(resize)
    size = spec.image_size
    if mode == "pad":
        image = _padded(image, spec)
    if mode == "crop":
        image = _cropped(image, size)
    else:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return as_pixels(image)


def as_pixels(image: Image.Image) -> Tensor:
    """Return an RGB image's pixels, (3, H, W) uint8."""
    # NumPy's transposing copy is faster than PyTorch's.
    return torch.from_numpy(np.array(np.asarray(image).transpose(2, 0, 1), order="C"))


def checked_resize(resize: str) -> str:
    """Return ``resize`` if it's known.

    Raises:
        ValueError: If it isn't.
    """
    if resize not in RESIZES:
        raise ValueError(f"resize must be one of {', '.join(RESIZES)}, got {resize!r}")
    return resize


def _padded(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """Put an image into the middle of a square, which is still to be resized.

    A wide image gets its final width already. PIL resizes widths first, then heights, so that the
    square comes out the same, bit by bit; but rows of padding needn't be resized.
    """
    width, height = image.size
    side = max(width, height)
    canvas = (side, side)
    if width > height:
        canvas = (spec.image_size, side)
        image = image.resize((spec.image_size, height), Image.Resampling.BICUBIC)
    # Truncated, not rounded, as in LLaVA's public preprocessing.
    red, green, blue = (int(value * 255) for value in spec.mean)
    padded = Image.new("RGB", canvas, (red, green, blue))
    padded.paste(image, ((canvas[0] - image.width) // 2, (side - height) // 2))
    return padded


def _cropped(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    shorter = min(width, height)
    # Integer arithmetic on the longer side, as transformers' CLIPImageProcessor has it.
    width, height = int(size * width / shorter), int(size * height / shorter)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
