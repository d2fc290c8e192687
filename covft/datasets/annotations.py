"""Annotation files in LLaVA's format: reading, and the checks that need no image."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from covft.conversation import Template, checked_turns, placed_images

Record = Mapping[str, Any]


def read_annotations(annotations: str | Sequence[str | Record]) -> list[Record]:
    """Return the records of annotation files (.json: one list; .jsonl: one record a line).

    Args:
        annotations: A path, or a list of paths and records.

    Raises:
        ValueError: If a file is missing or can't be parsed, or an entry is no record.
    """
    records: list[Record] = []
    for item in [annotations] if isinstance(annotations, str) else annotations:
        records += _read_file(Path(item)) if isinstance(item, str) else [item]
    for number, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise ValueError(
                f"annotation {number} is a {type(record).__name__}, expected an object with "
                "'conversations'"
            )
    return records


def _read_file(path: Path) -> list[Record]:
    if not path.is_file():
        raise ValueError(f"annotation file not found: {path}")
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".jsonl":
        return [
            _parsed(line, f"{path}, line {number}")
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    records = _parsed(text, str(path))
    if not isinstance(records, list):
        raise ValueError(f"{path} holds no list of records; name it .jsonl if it has one a line")
    return records


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no valid JSON: {error}") from error


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


def estimated_length(record: Record, *, num_image_tokens: int) -> int:
    """Return about how many tokens a record has, without tokenising it.

    Four bytes a token hold for English and, at three bytes a character, roughly for Chinese too;
    counting words would call any Chinese text one word.

    Args:
        record: With turns that have been checked.
        num_image_tokens: Tokens of all its images together.
    """
    num_bytes = sum(len(turn["value"].encode()) for turn in record["conversations"])
    return math.ceil(num_bytes / 4) + num_image_tokens
