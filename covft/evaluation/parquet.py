"""Parquet files of benchmarks, as Hugging Face writes them; needs pyarrow."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from PIL import Image

from covft.evaluation.tables import Row, check_columns, decode_image, existing, unexpected_columns


class ParquetFiles:
    """One table in one or several files, with images in a column of their own.

    Args:
        paths: The files, in order.
        columns: Columns that they must have, besides the images'.
        image: The images' column.
        unread: Further columns of the official files, which nobody reads.

    Attributes:
        unexpected: Columns that are neither; they are logged, too.

    Raises:
        ValueError: If a file is missing or no parquet, or a column is missing.
        ImportError: If pyarrow isn't installed.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        columns: Sequence[str],
        image: str = "image",
        unread: Sequence[str] = (),
    ) -> None:
        self.paths = [existing(path) for path in paths]
        self.columns, self.image = list(columns), image
        self._lock = Lock()
        self._spans: list[tuple[int, int]] | None = None
        self._problems: dict[int, str] = {}
        self._spool: mmap.mmap | None = None
        self.unexpected: list[str] = []
        for path in self.paths:
            names = self._open(path).schema_arrow.names
            check_columns(path, expected=[*self.columns, image], found=names)
            known = [*self.columns, image, *unread, *self.unexpected]
            self.unexpected += unexpected_columns(path, known=known, found=names)

    def rows(self) -> list[Row]:
        """Read all but the images.

        Raises:
            ValueError: If a file is damaged; names it.
        """
        rows: list[Row] = []
        for path in self.paths:
            try:
                cells = self._open(path).read(columns=self.columns).to_pylist()
            except _damages() as error:
                raise ValueError(f"{path} is damaged: {error}") from error
            rows += [
                Row(f"{path.name}, row {place}", len(rows) + place - 1, values)
                for place, values in enumerate(cells, start=1)
            ]
        return rows

    def open_image(self, number: int) -> Image.Image:
        """Open the image of a row as RGB.

        Args:
            number: The row's, see :class:`Row`.

        Raises:
            ValueError: If there is none, or it can't be read.
        """
        with self._lock:
            if self._spans is None:
                self._spans = self._unpack()
        offset, length = self._spans[number]
        where = f"{self.paths[0].parent}, image of row {number + 1}"
        if number in self._problems:
            raise ValueError(f"{where}: {self._problems[number]}")
        if not length or self._spool is None:
            raise ValueError(f"{where}: there is none")
        return decode_image(self._spool[offset : offset + length], where=where)

    def _unpack(self) -> list[tuple[int, int]]:
        """Copy the encoded images to an unnamed file: parquet can't give one without hundreds."""
        spans: list[tuple[int, int]] = []
        offset = 0
        with tempfile.TemporaryFile() as spool:
            for value in self._values():
                data = value.get("bytes") if isinstance(value, dict) else value
                if isinstance(data, _Damage):
                    self._problems[len(spans)] = data.reason
                elif data is not None and not isinstance(data, bytes):
                    reason = f"'{self.image}' must hold bytes, found {type(data).__name__}"
                    self._problems[len(spans)] = reason
                written = spool.write(data) if isinstance(data, bytes) else 0
                spans.append((offset, written))
                offset += written
            spool.flush()
            if offset:
                self._spool = mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ)
        return spans

    def _values(self) -> Iterator[Any]:
        """Yield what each row has for an image; damage costs what is left of its row group."""
        for path in self.paths:
            file = self._open(path)
            for group in range(file.num_row_groups):
                num_left = file.metadata.row_group(group).num_rows
                try:
                    for batch in file.iter_batches(16, row_groups=[group], columns=[self.image]):
                        values = batch.column(0).to_pylist()
                        num_left -= len(values)
                        yield from values
                except _damages() as error:
                    damage = _Damage(f"{path.name} is damaged: {error}")
                    yield from [damage] * num_left

    @staticmethod
    def _open(path: Path) -> Any:
        try:
            from pyarrow import ArrowInvalid
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise ImportError(
                f"reading {path} needs pyarrow: pip install -e '.[eval]' ({error})"
            ) from error
        try:
            return ParquetFile(path)
        except (ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} is no parquet file: {error}") from error


@dataclass(frozen=True)
class _Damage:
    reason: str


def _damages() -> tuple[type[BaseException], ...]:
    from pyarrow import ArrowException

    return (ArrowException, OSError)


def parquet_paths(root: Path) -> list[Path]:
    """Return the parquet files of a test split: ``test*.parquet`` below a folder, or else all.

    Raises:
        ValueError: If there are none.
    """
    found = sorted(root.rglob("test*.parquet")) or sorted(root.rglob("*.parquet"))
    if not found:
        raise ValueError(f"no test*.parquet in {root}; data/README.md tells the layout")
    return found
