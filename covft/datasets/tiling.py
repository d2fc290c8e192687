"""Dynamic tiling: an image of any shape as several square tiles (InternVL 1.5, Chen et al., 2024).

The image is stretched to the grid of tiles whose shape is closest to its own, and cut; where that
makes more than one tile, a thumbnail of the whole comes last. Grids, ties and pixels are those of
OpenGVLab's public preprocessing with at least one tile and the thumbnail switched on; and as in
InternVL 2's training, a sample's images share its tiles evenly. Choice: at inference, too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from covft.datasets.transforms import RESIZES, as_pixels, transform
from covft.models.vision.image_spec import ImageSpec


@dataclass(frozen=True)
class Tiles:
    """The way to resize that cuts images into tiles of the encoder's size.

    Attributes:
        max_tiles: Tiles of a sample's images together, thumbnails not counted; more images than
            that get one each.

    Raises:
        ValueError: If ``max_tiles`` is no positive whole number.
    """

    max_tiles: int

    def __post_init__(self) -> None:
        if not isinstance(self.max_tiles, int) or self.max_tiles < 1:
            raise ValueError(f"max_tiles must be a positive whole number, got {self.max_tiles!r}")

    def share(self, num_images: int) -> Tiles:
        """Return the way to resize each of a sample's images."""
        return Tiles(max(self.max_tiles // max(num_images, 1), 1))

    @property
    def max_squares(self) -> int:
        """Squares of a lone image at most, its thumbnail included."""
        return self.max_tiles + (self.max_tiles > 1)


#: How images become squares: ``crop``, ``stretch`` or ``pad`` (see
#: :class:`covft.models.vision.image_spec.ImageSpec`), tiles, or None for the encoder's own way.
Resizing = str | Tiles | None


def checked_resizing(resize: Resizing, max_tiles: int | None = None) -> Resizing:
    """Return what ``resize`` and ``max_tiles`` of a config mean together.

    Args:
        resize: "crop", "stretch", "pad", "tiles", or None for the encoder's own way.
        max_tiles: See :class:`Tiles`; with "tiles", and only then.

    Raises:
        ValueError: If ``resize`` is unknown, or ``max_tiles`` is missing or would be ignored.
    """
    if resize == "tiles":
        if max_tiles is None:
            raise ValueError(
                "resize='tiles' needs max_tiles, 6 in InternVL2's fine-tuning; outside a config, "
                "give resize=Tiles(6)"
            )
        return Tiles(max_tiles)
    if max_tiles is not None:
        raise ValueError(
            f"max_tiles={max_tiles} has no effect with resize={resize!r}; set resize='tiles' or "
            "remove max_tiles"
        )
    if resize is not None and resize not in RESIZES and not isinstance(resize, Tiles):
        raise ValueError(f"resize must be one of {', '.join(RESIZES)}, tiles, got {resize!r}")
    return resize


def squares(images: Sequence[Image.Image], spec: ImageSpec, *, resize: Resizing) -> list[Tensor]:
    """Return the pixels of a sample's images as the encoder takes them.

    Args:
        images: RGB, of any size.
        spec: The encoder's pixels.
        resize: How an image becomes one or more squares.

    Returns:
        Of each image (n, 3, S, S) uint8; n is 1 but for tiles.

    Raises:
        ValueError: If ``resize`` is unknown.
    """
    resize = checked_resizing(resize)
    if not isinstance(resize, Tiles):
        return [transform(image, spec, resize=resize)[None] for image in images]
    share = resize.share(len(images))
    return [tiled(image, tile_size=spec.image_size, max_tiles=share.max_tiles) for image in images]


def stacked(pixels: Sequence[Tensor], spec: ImageSpec) -> Tensor:
    """Return what :func:`squares` gave as one tensor, (I, 3, S, S); I is 0 without images."""
    size = spec.image_size
    return torch.cat([torch.empty(0, 3, size, size, dtype=torch.uint8), *pixels])


def tiled(image: Image.Image, *, tile_size: int, max_tiles: int) -> Tensor:
    """Cut an image into tiles.

    Args:
        image: RGB, of any size.
        tile_size: Side S of a tile, in pixels.
        max_tiles: Tiles at most.

    Returns:
        Tiles from left to right, then down, and the thumbnail, (n, 3, S, S) uint8.
    """
    columns, rows = tile_grid(*image.size, tile_size=tile_size, max_tiles=max_tiles)
    size = (columns * tile_size, rows * tile_size)
    whole = as_pixels(image.resize(size, Image.Resampling.BICUBIC))
    tiles = whole.unflatten(2, (columns, tile_size)).unflatten(1, (rows, tile_size))
    tiles = tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)
    if len(tiles) > 1:
        thumbnail = image.resize((tile_size, tile_size), Image.Resampling.BICUBIC)
        tiles = torch.cat([tiles, as_pixels(thumbnail)[None]])
    return tiles.contiguous()


def num_squares(width: int, height: int, *, tile_size: int, max_tiles: int) -> int:
    """Return how many squares :func:`tiled` makes of an image of that size, in pixels."""
    columns, rows = tile_grid(width, height, tile_size=tile_size, max_tiles=max_tiles)
    return 1 if columns * rows == 1 else columns * rows + 1


def tile_grid(width: int, height: int, *, tile_size: int, max_tiles: int) -> tuple[int, int]:
    """Return the columns and rows of tiles that suit an image.

    The grid closest in ratio of width to height wins; of equally close ones, the largest that is
    less than twice the image's area.

    Args:
        width: Of the image, in pixels.
        height: Of the image, in pixels.
        tile_size: Side of a tile, in pixels.
        max_tiles: Tiles at most.
    """
    ratio, area = width / height, width * height
    best, smallest = (1, 1), float("inf")
    for columns, rows in _grids(max_tiles):
        difference = abs(ratio - columns / rows)
        fits = area > 0.5 * tile_size * tile_size * columns * rows
        if difference < smallest or (difference == smallest and fits):
            best, smallest = (columns, rows), difference
    return best


@functools.cache
def _grids(max_tiles: int) -> list[tuple[int, int]]:
    """Return all grids of up to that many tiles, the smaller first.

    The order of equally large ones doesn't matter: a third is always closer than two that tie.
    """
    sides = range(1, max_tiles + 1)
    grids = [(columns, rows) for columns in sides for rows in sides if columns * rows <= max_tiles]
    return sorted(grids, key=lambda grid: grid[0] * grid[1])
