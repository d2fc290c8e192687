"""Official files of benchmarks as rows: TSV, CSV, JSON; parquet is in :mod:`.parquet`.

A file that is missing or of another format is an error that names it. A broken row isn't: it
becomes an item that says what is wrong with it, so that it is listed and counts as wrong. Images
stay in their files, encoded, until one is opened.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import itertools
import json
import logging
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from PIL import Image, UnidentifiedImageError

from covft.evaluation.answers import LETTERS
from covft.evaluation.benchmark import Item

#: Longest cell: images in base64 are far beyond Python's default of 128 KiB.
_MAX_CELL = 2**31 - 1


class RowError(ValueError):
    """A row that can't be asked; says which column is wrong, and how."""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        where: File and row, for messages.
        number: Its place in the table, from 0 on.
        cells: Values by column.
        span: Offset and length of the row in its file, in bytes, where the file is text.
        problem: Why its cells can't be trusted.
    """

    where: str
    number: int
    cells: Mapping[str, Any]
    span: tuple[int, int] = (0, 0)
    problem: str | None = None

    def optional(self, column: str) -> str | None:
        """Return a cell as text; None if there is nothing in it (see :func:`is_missing`)."""
        value = self.cells.get(column)
        return None if is_missing(value) else str(value)

    def text(self, column: str) -> str:
        """Return a cell as text.

        Raises:
            RowError: If there is nothing in it.
        """
        value = self.optional(column)
        if value is None:
            raise RowError(f"'{column}' is empty")
        return value

    def integer(self, column: str) -> int:
        """Return a cell as a whole number.

        Raises:
            RowError: If it is none.
        """
        text = self.text(column)
        try:
            return int(text)
        except ValueError as error:
            raise RowError(f"'{column}' must be a whole number, {error}") from None

    def texts(self, column: str) -> list[str]:
        """Return a cell that holds several texts.

        Raises:
            RowError: If it holds none, or one of them is empty.
        """
        values = self.cells.get(column)
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise RowError(f"'{column}' must hold several texts, found {values!r}")
        if any(is_missing(value) for value in values):
            raise RowError(f"'{column}' holds an empty text: {list(values)}")
        return [str(value) for value in values]

    def letter(self, column: str, num_options: int) -> str:
        """Return a cell that names an option, "C" or "(c)", as a capital.

        Raises:
            RowError: If it isn't the letter of one of the options.
        """
        text = self.text(column).strip()
        found = re.fullmatch(r"\(?([A-Za-z])\)?", text)
        if found is None or found[1].upper() not in LETTERS[:num_options]:
            raise RowError(f"'{column}' is '{text}', but there are {num_options} options from A on")
        return found[1].upper()


def is_missing(value: object) -> bool:
    """Tell whether nothing is in a cell: null, NaN, blank, or "nan", as pandas writes NaN.

    "None" and "NA" are texts: questions have them as options.
    """
    if isinstance(value, float):
        return math.isnan(value)
    text = "" if value is None else str(value).strip()
    return len(text) <= 3 and text.lower() in ("", "nan")  # not lowering images in base64


def items_of(
    rows: Iterable[Row],
    make: Callable[[Row], Item],
    *,
    identify: Callable[[Row], tuple[str, str | None]],
) -> list[Item]:
    """Make items of rows; a broken row's item says what is wrong.

    Args:
        rows: The rows.
        make: Makes an item of a row; raises :class:`RowError` if it can't.
        identify: Returns id and group of a row, so that a broken one counts with its group; may
            raise :class:`RowError` as well.
    """
    items: dict[str, Item] = {}
    for row in rows:
        item_id, group = f"({row.where})", None
        try:
            item_id, group = identify(row)
            problems = [row.problem] if row.problem else []
            if item_id in items:  # a broken row's id may be another's: that one stays
                problems.append(f"'{item_id}' is there twice")
                item_id = f"{item_id} ({row.where})"
            if problems:
                raise RowError("; ".join(problems))
            item = make(row)
        except RowError as error:
            problem = f"{row.where}: {error}"
            item = Item(id=item_id, question="", answer="", group=group, problem=problem)
        items[item.id] = item
    return list(items.values())


class DelimitedFile:
    """A TSV or CSV file with a header, quoted as spreadsheets and pandas do.

    Args:
        path: The file, UTF-8.
        columns: Columns that it must have; others are read, too.
        delimiter: What stands between cells.
        aliases: Columns by other names that they are known to have in official files.
        unread: Further columns of the official files, which nobody reads.

    Attributes:
        unexpected: Columns that are neither, once a row was read; they are logged, too.

    Raises:
        ValueError: If the file is missing.
    """

    def __init__(
        self,
        path: Path,
        *,
        columns: Sequence[str],
        delimiter: str,
        aliases: Mapping[str, str] | None = None,
        unread: Sequence[str] = (),
    ) -> None:
        self.path = existing(path)
        self.columns, self.delimiter, self.aliases = columns, delimiter, aliases or {}
        self.unread = unread
        self.unexpected: list[str] = []

    def rows(self) -> Iterator[Row]:
        """Read the file, one row at a time.

        Raises:
            ValueError: If a column is missing, or the file isn't UTF-8 or no such table.
        """
        with self.path.open("rb") as file:
            lines = _Lines(file)
            try:
                records = self._records(lines)
                header = self._header(next(records, []))
                self._note_unexpected(header)
                number, start, line = 0, lines.position, lines.number
                for cells in records:
                    if cells:
                        span = (start, lines.position - start)
                        yield self._row(header, cells, number, span, lines.number - line)
                        number += 1
                    start, line = lines.position, lines.number
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"{self.path}, line {lines.number}: {error}") from error

    def _records(self, lines: Iterable[str]) -> Iterator[list[str]]:
        csv.field_size_limit(_MAX_CELL)
        lines = iter(lines)
        for line in lines:
            if '"' in line:
                yield next(csv.reader(itertools.chain([line], lines), delimiter=self.delimiter))
            else:  # 10 times as fast, which counts for images in base64
                bare = line.rstrip("\r\n")
                yield bare.split(self.delimiter) if bare else []

    def cell(self, span: tuple[int, int], column: str) -> str:
        """Read one cell again.

        Args:
            span: The row's, see :class:`Row`.
            column: Its column.
        """
        with self.path.open("rb") as file:
            header = self._header(next(self._records(_Lines(file))))
            file.seek(span[0])
            text = file.read(span[1]).decode()
        cells = next(self._records(io.StringIO(text, newline="")))
        return cells[header.index(column)]

    def _header(self, cells: Sequence[str]) -> list[str]:
        header = [self.aliases.get(cell.strip(), cell.strip()) for cell in cells]
        check_columns(self.path, expected=self.columns, found=header)
        return header

    def _note_unexpected(self, header: Sequence[str]) -> None:
        if not self.unexpected:  # else the file is being read again
            known = [*self.columns, *self.unread]
            self.unexpected = unexpected_columns(self.path, known=known, found=header)

    def _row(
        self,
        header: Sequence[str],
        cells: Sequence[str],
        number: int,
        span: tuple[int, int],
        num_lines: int,
    ) -> Row:
        problem = None
        if len(cells) != len(header):
            problem = f"{len(cells)} cells, but the header has {len(header)}"
            if num_lines > 1:  # a stray quote takes all up to the next one for a cell
                problem += f'; it spans {num_lines} lines: is a quote (") left open?'
        where = f"{self.path.name}, row {number + 1}"
        return Row(where, number, dict(zip(header, cells, strict=False)), span, problem)


class _Lines:
    """Lines of a file as text, counted, with the offset behind the last one."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.file = file
        self.position = self.number = 0

    def __iter__(self) -> Iterator[str]:
        # Not by iterating over the file: that reads ahead, and seeking would have to know.
        while line := self.file.readline():
            self.number += 1
            self.position += len(line)
            yield line.decode("utf-8-sig" if self.number == 1 else "utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: If it is missing or damaged; names file, line and column.
    """
    try:
        return json.loads(existing(path).read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def read_json_lines(path: Path) -> list[Row]:
    """Read a file with a JSON object a line; a broken line is a row with a problem.

    Raises:
        ValueError: If the file is missing or not UTF-8.
    """
    rows: list[Row] = []
    try:
        lines = existing(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} isn't UTF-8: {error}") from error
    for line_number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path.name}, line {line_number}"
            cells, problem = _json_object(line)
            rows.append(Row(where, len(rows), cells, problem=problem))
    return rows


def _json_object(line: str) -> tuple[dict[str, Any], str | None]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return {}, f"no JSON: {error}"
    return (value, None) if isinstance(value, dict) else ({}, "no JSON object")


def decode_base64(text: str, *, where: str) -> bytes:
    """Decode a cell that holds a file in base64.

    Raises:
        ValueError: If it isn't base64.
    """
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{where}: the image's base64 is broken ({error})") from error


def decode_image(data: bytes, *, where: str) -> Image.Image:
    """Decode an image file's content as RGB.

    Raises:
        ValueError: If it is no image or damaged.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{where}: no image, {len(data)} bytes of something else") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise ValueError(f"{where}: the image can't be read ({error})") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{where}: the image is too large ({error})") from error


def check_columns(path: Path, *, expected: Sequence[str], found: Sequence[str]) -> None:
    """Raise a ValueError if columns are missing; others may be there."""
    missing = [column for column in expected if column not in found]
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(map(repr, missing))}; expected "
            f"{', '.join(expected)}; found {', '.join(found) or 'nothing'}"
        )


def unexpected_columns(path: Path, *, known: Sequence[str], found: Sequence[str]) -> list[str]:
    """Return the columns that aren't known; log them."""
    unexpected = [column for column in found if column not in known]
    if unexpected:
        print_log(
            f"{path} has columns that aren't read: {', '.join(map(repr, unexpected))}; is it the "
            "official file?",
            logger="current",
            level=logging.WARNING,
        )
    return unexpected


def existing(path: Path) -> Path:
    """Return a file's path.

    Raises:
        ValueError: If the file isn't there.
    """
    if not path.is_file():
        raise ValueError(f"{path} not found; data/README.md tells the layout")
    return path
