"""What is known of every record of some annotations, as small arrays.

Samplers need every record's length, and workers its place in the file. Both come from one pass
over the annotations, which is kept in the cache folder: opening a file again takes milliseconds,
and processes share the arrays.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmengine.logging import print_log

from covft.datasets.annotations import Record, RecordCheck
from covft.datasets.record_file import Located, RecordFile
from covft.weights.cache import build_once, cache_root

#: Changes whenever the arrays, or what they are made by, do.
_FORMAT = 1
#: Smaller files are gone through each time: that takes no longer than to find them in the cache.
_SMALLEST_CACHED = 1 << 20
_ROWS, _BAD = "rows.npy", "bad.json"

#: One record: where it lies in its file, its text in bytes, its images, and their squares.
ROW = np.dtype(
    [
        ("start", "<i8"),
        ("size", "<i4"),
        ("num_bytes", "<i4"),
        ("num_images", "<i4"),
        ("num_squares", "<i4"),
        ("usable", "?"),
    ]
)


class BadRecord(NamedTuple):
    """A record that can't be used: its number, the id it states, if any, and what is wrong."""

    number: int
    id: str | None
    reason: str


@dataclass(frozen=True)
class RecordIndex:
    """The arrays.

    Attributes:
        rows: Of every record, (R,) of :data:`ROW`.
        bad: Those that can't be used.
        folder: Where it is kept in the cache, None if it isn't.
    """

    rows: np.ndarray
    bad: tuple[BadRecord, ...]
    folder: Path | None = None

    @classmethod
    def of_records(cls, records: Sequence[Record], check: RecordCheck) -> RecordIndex:
        """Make the index of records that are in memory.

        Raises:
            ValueError: If an entry is no record.
        """
        return cls(*_measured(((0, 0, record) for record in records), check))

    @classmethod
    def of_file(cls, file: RecordFile, check: RecordCheck) -> RecordIndex:
        """Make the index of a file, or take it from the cache.

        Raises:
            ValueError: If the file can't be parsed, or an entry is no record.
        """
        if file.state.size < _SMALLEST_CACHED:
            return cls(*_measured(file.scan(), check, where=f"{file.path}, "))
        # Whose message names the file's place isn't another file's index.
        key = [str(file.path.absolute()), repr(file.state), _check_key(check), _FORMAT]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
        folder = cache_root() / "annotations" / f"{file.path.stem}-{digest}"
        found: list[RecordIndex] = []

        def write(target: Path) -> Path:
            found.append(_scanned(file, check))
            found[0].save(target)
            return target

        try:
            built = build_once(folder, _renamed(write))
            return cls.load(built)
        except OSError as error:
            print_log(
                f"{file.path}: its index can't be kept in {folder.parent} ({error}), so that each "
                "process makes its own; set COVFT_CACHE to a folder that can be written",
                logger="current",
                level=logging.WARNING,
            )
        return found[0] if found else _scanned(file, check)

    @classmethod
    def load(cls, folder: Path) -> RecordIndex:
        """Read what :meth:`save` wrote; processes share the pages of the arrays."""
        bad = json.loads((folder / _BAD).read_text(encoding="utf-8"))
        rows = np.load(folder / _ROWS, mmap_mode="r")
        return cls(rows, tuple(BadRecord(*entry) for entry in bad), folder)

    def save(self, folder: Path) -> None:
        """Write the index into an empty folder."""
        (folder / _BAD).write_text(json.dumps(self.bad), encoding="utf-8")
        np.save(folder / _ROWS, self.rows)

    def __reduce__(self) -> tuple[Callable[..., RecordIndex], tuple[Any, ...]]:
        if self.folder is not None:
            return RecordIndex.load, (self.folder,)
        return RecordIndex, (self.rows, self.bad)


def _renamed(write: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """Let :func:`build_once` move a folder inside of its own, which it removes afterwards."""

    def build(partial: Path) -> Path:
        target = partial / "index"
        target.mkdir()
        return write(target)

    return build


def _check_key(check: RecordCheck) -> str:
    return repr((check.template, check.resize, check.tile_size))


def _scanned(file: RecordFile, check: RecordCheck) -> RecordIndex:
    print_log(f"{file.path}: going through the annotations", logger="current")
    return RecordIndex(*_measured(file.scan(), check, where=f"{file.path}, "))


def _measured(
    records: Iterable[Located], check: RecordCheck, *, where: str = ""
) -> tuple[np.ndarray, tuple[BadRecord, ...]]:
    rows, bad = [], []
    measure = check.measure
    for number, (start, size, record) in enumerate(records):
        # The first is true of all that a file can hold, and takes no time.
        if type(record) is not dict and not isinstance(record, Mapping):
            raise ValueError(
                f"{where}annotation {number} is a {type(record).__name__}, expected an object with "
                "'conversations'"
            )
        try:
            rows.append((start, size, *measure(record), True))
        except ValueError as error:
            stated = str(record["id"]) if "id" in record else None
            bad.append(BadRecord(number, stated, str(error)))
            rows.append((start, size, 0, 0, 0, False))
    return np.array(rows, dtype=ROW), tuple(bad)
