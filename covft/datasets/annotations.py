"""Records in LLaVA's format, and the checks of them that need no image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from covft.conversation import IMAGE_TOKEN, Template, checked_turns, placed_images
from covft.datasets.tiling import Resizing, Tiles, num_squares

Record = Mapping[str, Any]

#: Bytes of text that make about one token. Holds for English and, at three bytes a character,
#: roughly for Chinese too; counting words would call any Chinese text one word.
BYTES_PER_TOKEN = 4


def image_paths(record: Record) -> list[str]:
    """Return the paths of a record's images; a missing or empty ``image`` means none.

    Raises:
        ValueError: If ``image`` is neither a path nor a list of paths.
    """
    image = record.get("image")
    if not image:
        return []
    paths = [image] if isinstance(image, str) else image
    if not isinstance(paths, Sequence) or not all(isinstance(p, str) and p for p in paths):
        raise ValueError(f"'image' must be a path or a list of paths, got {image!r}")
    return list(paths)


def check_record(record: Record, *, template: Template) -> None:
    """Check a record's turns and its number of images.

    Raises:
        ValueError: If it can't be used.
    """
    turns = record.get("conversations")
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise ValueError("'conversations' is missing or no list of turns")
    if record.get("video"):
        raise ValueError("it has a video, which isn't supported; leave it out of the annotations")
    checked = checked_turns(turns, answered=True)
    placed_images(checked, len(image_paths(record)), template=template)


def image_sizes(record: Record) -> list[tuple[int, int]] | None:
    """Return width and height of a record's images if it states them, as InternVL's data do.

    ``width`` and ``height`` are for one image, ``width_list`` and ``height_list`` for several.
    """
    count = len(image_paths(record))
    sides = []
    for name in ("width", "height"):
        value = record.get(f"{name}_list", record.get(name))
        values = value if isinstance(value, list) else [value]
        if len(values) != count or not all(isinstance(v, int) and v > 0 for v in values):
            return None
        sides.append(values)
    return list(zip(*sides, strict=True))


@dataclass(frozen=True)
class RecordCheck:
    """What decides whether a record can be used, and how many squares its images make.

    Attributes:
        template: The LLM's; some can't hold every conversation.
        resize: How images become squares.
        tile_size: Side of a tile, in pixels.
    """

    template: Template
    resize: Resizing
    tile_size: int

    def measure(self, record: Record) -> tuple[int, int, int]:
        """Return a record's bytes of text, its images, and their squares.

        Raises:
            ValueError: If it can't be used.
        """
        text = _plain_text(record, keep_questions=self.template.keep_questions)
        if text is not None:
            num_images = 1 if record.get("image") else 0
        else:
            check_record(record, template=self.template)
            num_images = len(image_paths(record))
            text = "".join(turn["value"] for turn in record["conversations"])
        # A character outside Unicode is the tokenizer's to refuse, not a reason to stop here.
        num_bytes = len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))
        if not isinstance(self.resize, Tiles):
            return num_bytes, num_images, num_images
        return num_bytes, num_images, self._bounded_squares(record, num_images, self.resize)

    def squares(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Return how many squares images of those widths and heights, in pixels, become."""
        if not isinstance(self.resize, Tiles):
            return [1] * len(sizes)
        share = self.resize.share(len(sizes))
        grid = {"tile_size": self.tile_size, "max_tiles": share.max_tiles}
        return [num_squares(width, height, **grid) for width, height in sizes]

    def _bounded_squares(self, record: Record, num_images: int, tiles: Tiles) -> int:
        """Count the squares of a record's images, or bound them where it doesn't state its sizes.

        Opening every image would take hours.
        """
        sizes = image_sizes(record)
        if sizes is None:
            return num_images * tiles.share(num_images).max_squares
        return sum(self.squares(sizes))


_ROLES = {2 * n: ["human", "gpt"] * n for n in range(1, 65)}


def _plain_text(record: Record, *, keep_questions: bool) -> str | None:
    """Return the text of a record whose use is plain to see; None if it takes a closer look.

    Most records alternate and have a tag for an image; :func:`check_record` would take ten times
    as long to find that out, and minutes for a million.
    """
    turns, image = record.get("conversations"), record.get("image")
    if type(turns) is not list or record.get("video") or not (keep_questions or len(turns) == 2):
        return None
    try:
        if [turn["from"] for turn in turns] != _ROLES.get(len(turns)):
            return None
        values = [turn["value"] for turn in turns]
        text = "".join(values)
    except (TypeError, KeyError):
        return None
    # A tag that only the joining makes sends a good record to the closer look: no harm.
    tags = text.count(IMAGE_TOKEN)
    if tags and IMAGE_TOKEN in "".join(values[1::2]):
        return None
    if image is None or isinstance(image, str):
        return text if tags <= bool(image) else None
    return None
