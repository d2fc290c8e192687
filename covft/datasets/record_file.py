"""Annotation files of any size, of which one record at a time is in memory.

A file is gone through once, which finds where its records lie; after that, a record is read and
parsed when it is needed. LLaVA's lists (.json) are read where they are, like files of one record a
line (.jsonl): nothing is converted.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

_BLOCK = 1 << 22
#: A record that is still unfinished after so many characters is broken.
_LONGEST_RECORD = 1 << 26
_BOM = codecs.BOM_UTF8
_BETWEEN = re.compile(r"[ \t\r\n]*,?[ \t\r\n]*")


#: Where a record lies, its first byte and how many, and the record.
Located = tuple[int, int, Any]


@dataclass(frozen=True)
class FileState:
    """What tells one content of a file from another."""

    size: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        """Return that of a file's status."""
        return cls(status.st_size, status.st_mtime_ns)


class RecordFile:
    """Reads records by their place; a copy in another process opens the file by itself.

    Args:
        path: A .json or .jsonl file.

    Attributes:
        state: The file's state when it was named here; another one is an error later.

    Raises:
        ValueError: If there is no such file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"annotation file not found: {self.path}")
        self.state = FileState.of(self.path.stat())
        self._descriptor: int | None = None

    def scan(self) -> Iterator[Located]:
        """Go through all records, in their order.

        Raises:
            ValueError: If the file can't be parsed; names the place.
            RuntimeError: If it has changed before the end was reached.
        """
        with self.path.open("rb") as file:
            if self.path.suffix == ".jsonl":
                yield from _scan_lines(file, self.path)
            else:
                yield from _scan_list(file, self.path)
            self._check_unchanged(file.fileno())

    def read(self, start: int, size: int) -> Any:
        """Return the record that :meth:`scan` has found at that place.

        Raises:
            RuntimeError: If the file has changed since, or is gone. No ValueError, which a dataset
                takes for one bad sample: all that follow would be wrong.
        """
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY)
            # pread has no position of its own, so that forked workers can share the descriptor.
            text = os.pread(self._descriptor, size, start)
        except OSError as error:
            raise RuntimeError(f"{self.path} can't be read any more: {error}") from error
        # At every read, and after it: the file may be written over in place at any time.
        self._check_unchanged(self._descriptor)
        try:
            return parse(text)
        except ValueError as error:
            raise self.changed() from error

    def changed(self) -> RuntimeError:
        """Return the error of a file that isn't what it was when it was gone through."""
        return RuntimeError(f"{self.path} has changed since the run began; start it again")

    def _check_unchanged(self, descriptor: int) -> None:
        if FileState.of(os.fstat(descriptor)) != self.state:
            raise self.changed()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        descriptor = getattr(self, "_descriptor", None)
        if descriptor is not None:
            os.close(descriptor)


def parse(text: bytes) -> Any:
    """Return what a piece of JSON stands for.

    Raises:
        ValueError: If it's broken.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return json.loads(text)  # takes NaN and half a character, too


def _scan_lines(file: BinaryIO, path: Path) -> Iterator[Located]:
    position = 0
    for number, line in enumerate(file, start=1):
        start, position = position, position + len(line)
        if number == 1 and line.startswith(_BOM):
            start, line = start + len(_BOM), line[len(_BOM) :]
        if line.isspace():
            continue
        try:
            record = parse(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no valid JSON: {error}") from error
        yield start, len(line), record


def _scan_list(file: BinaryIO, path: Path) -> Iterator[Located]:
    """Go through the entries of one list, a few megabytes at a time."""
    window = _Window(file, path)
    if window.between() != "[":
        raise ValueError(f"{path} holds no list of records; name it .jsonl if it has one a line")
    window.skip(1)
    number = 0
    while (found := window.between(separated=number > 0)) != "]":
        if not found:
            raise ValueError(f"{path} is no valid JSON: the list isn't closed; is it cut off?")
        yield window.entry(number)
        number += 1
    window.skip(1)
    if not window.is_over():
        raise ValueError(f"{path} is no valid JSON: there is more after the list's end")


class _Window:
    """The part of a text file that is being parsed, and where it begins in bytes."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._at, self._ended = "", 0, False
        self._bytes = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
        file.seek(self._bytes)

    def between(self, *, separated: bool = False) -> str:
        """Go to the next character that is no white space; return it, or "" at the file's end.

        Args:
            separated: Whether a comma has to come before it, unless it ends the list.
        """
        while True:
            match = _BETWEEN.match(self._text, self._at)
            assert match is not None
            if match.end() < len(self._text) or not self._grow():
                break
        following = self._text[match.end() : match.end() + 1]
        if following and ("," in match[0]) != (separated and following != "]"):
            where = self._bytes + len(match[0])
            raise ValueError(
                f"{self._path} is no valid JSON: a comma too many or few, byte {where}"
            )
        self.skip(match.end() - self._at)
        return following

    def is_over(self) -> bool:
        """Tell whether only white space follows, up to the file's end."""
        while not self._text[self._at :].strip(" \t\r\n"):
            self.skip(len(self._text) - self._at)
            if not self._grow():
                return True
        return False

    def skip(self, count: int) -> None:
        """Go on by so many characters."""
        passed = self._text[self._at : self._at + count]
        self._bytes += len(passed) if passed.isascii() else len(passed.encode())
        self._at += count

    def entry(self, number: int) -> Located:
        """Parse the entry that begins here and go on behind it."""
        while True:
            try:
                record, end = self._parse(self._text, self._at)
                if end < len(self._text) or not self._grow():
                    break
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > _LONGEST_RECORD or not self._grow():
                    raise ValueError(
                        f"{self._path} is no valid JSON in record {number}, which begins at byte "
                        f"{self._bytes}: {error.msg}"
                    ) from error
        start = self._bytes
        self.skip(end - self._at)
        return start, self._bytes - start, record

    def _grow(self) -> bool:
        """Read on; tell whether there was more."""
        block = self._file.read(_BLOCK)
        self._ended = not block
        try:
            more = self._decode.decode(block, final=self._ended)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._path} is no UTF-8 text: {error}") from error
        if self._ended:
            return False
        self._text, self._at = self._text[self._at :] + more, 0
        return True
