"""Image files, opened."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image


def load_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB.

    Raises:
        ValueError: If the file is missing, truncated or no image; names the path.
    """
    with _explained(path), Image.open(path) as image:
        if image.mode != "RGB":
            return image.convert("RGB")
        image.load()
        # Converting would copy the pixels once more.
        return image


def image_size(path: str | Path) -> tuple[int, int]:
    """Return an image file's width and height in pixels, from its header.

    Raises:
        ValueError: As :func:`load_image`, for what the header tells.
    """
    with _explained(path), Image.open(path) as image:
        return image.size


@contextmanager
def _explained(path: str | Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"image not found: {path}") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise ValueError(f"image can't be read: {path} ({error})") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"image is too large: {path} ({error})") from error
