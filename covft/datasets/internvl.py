"""InternVL's training data: a JSON file that names several annotation files and how to mix them.

Format: OpenGVLab's ``internvl_chat``, "Fine-tune on a Custom Dataset"; ``{name: {"root",
"annotation", "data_augment", "repeat_time", "length", "max_dynamic_patch"}}``. The records are
LLaVA's, one a line. Paths are relative to the working folder, as there.

Choices: a ``length`` that isn't the file's only warns, since InternVL's own training doesn't read
it, and metas outlive the files that they describe; ``data_augment``, which degrades images to JPEG
at random qualities, isn't implemented, and refused rather than ignored.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from mmengine.logging import print_log

from covft.datasets.annotations import RecordCheck
from covft.datasets.instruct import InstructDataset
from covft.datasets.record_source import RecordSource
from covft.datasets.spec import InputSpec
from covft.datasets.tiling import Tiles, checked_resizing
from covft.registry import DATASETS, nearest

_REQUIRED = ("root", "annotation")
_OPTIONAL = ("data_augment", "repeat_time", "length", "max_dynamic_patch")


@DATASETS.register_module()
class InternVLDataset(InstructDataset):
    """The data sets that a meta file names, one after the other.

    Args:
        meta: The .json file, or what it holds.
        spec: The model's side.
        resize: As for :class:`InstructDataset`.
        max_tiles: As for :class:`InstructDataset`; an entry's ``max_dynamic_patch`` goes before it
            in training. Inference takes this one.
        max_length: As for :class:`InstructDataset`.
        on_bad: As for :class:`InstructDataset`.
        fraction: As for :class:`InstructDataset`; of all entries together, repeats included.
        fraction_seed: As for :class:`InstructDataset`.

    Raises:
        ValueError: If the meta or a file it names can't be read, or an entry asks for what can't be
            had.
    """

    def __init__(
        self,
        meta: str | Mapping[str, Mapping[str, Any]],
        *,
        spec: InputSpec,
        resize: str | None = None,
        max_tiles: int | None = None,
        max_length: int = 2048,
        on_bad: Literal["skip", "raise"] = "skip",
        fraction: float = 1.0,
        fraction_seed: int | None = None,
    ) -> None:
        check = RecordCheck(
            spec.template, checked_resizing(resize, max_tiles), spec.image.image_size
        )
        where = meta if isinstance(meta, str) else "meta"
        sources: list[tuple[RecordSource, float]] = []
        for name, entry in _read_meta(meta).items():
            try:
                _check_entry(entry, tiles=resize == "tiles")
                sources.append((_source(name, entry, check), entry.get("repeat_time", 1)))
            except ValueError as error:
                raise ValueError(f"{where}, '{name}': {error}") from error
        self._set_up(
            sources,
            check,
            spec=spec,
            max_length=max_length,
            on_bad=on_bad,
            fraction=fraction,
            fraction_seed=fraction_seed,
        )


def _read_meta(meta: str | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(meta, str):
        path = Path(meta)
        if not path.is_file():
            raise ValueError(f"meta file not found: {path}")
        try:
            meta = json.loads(path.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(meta, Mapping) or not meta:
        raise ValueError(
            "a meta file holds an object {name: {'root', 'annotation', ...}} of at least one entry"
        )
    return meta


def _check_entry(entry: Any, *, tiles: bool) -> None:
    if not isinstance(entry, Mapping):
        raise ValueError(f"expected an object, got a {type(entry).__name__}")
    for key in entry:
        if key not in _REQUIRED + _OPTIONAL:
            raise ValueError(f"'{key}' is unknown; {nearest(key, _REQUIRED + _OPTIONAL)}")
    for key in _REQUIRED:
        if not isinstance(entry.get(key), str):
            raise ValueError(f"'{key}' must be a path, got {entry.get(key)!r}")
    if entry.get("data_augment", False):
        raise ValueError(
            "data_augment=true (JPEG degradation of the training images) isn't implemented; set it "
            "to false"
        )
    repeat = entry.get("repeat_time", 1)
    if not isinstance(repeat, (int, float)) or repeat <= 0 or (repeat > 1 and repeat % 1):
        raise ValueError(
            f"repeat_time must be a whole number of repeats, or a fraction below 1 for the first "
            f"part of the file, got {repeat!r}"
        )
    max_tiles = entry.get("max_dynamic_patch")
    if max_tiles is not None and not tiles:
        raise ValueError(
            "max_dynamic_patch has no effect without tiles; set train_dataset.resize='tiles'"
        )
    if max_tiles is not None:
        Tiles(max_tiles)


def _source(name: str, entry: Mapping[str, Any], check: RecordCheck) -> RecordSource:
    """Open an entry's annotations; it may set its own number of tiles."""
    max_tiles = entry.get("max_dynamic_patch")
    if max_tiles is not None:
        check = replace(check, resize=Tiles(max_tiles))
    source = RecordSource(entry["annotation"], check, root=entry["root"], name=name)
    stated, repeat = entry.get("length"), entry.get("repeat_time", 1)
    if stated is not None and stated != len(source):
        print_log(
            f"'{name}': the meta's length is {stated}, but {entry['annotation']} holds "
            f"{len(source)} records; they are used. If some should be there, fetch it again",
            logger="current",
            level=logging.WARNING,
        )
    if not int(len(source) * repeat):
        raise ValueError(f"repeat_time={repeat} of {len(source)} records leaves none")
    return source
