"""The file of a benchmark's answers: written line by line, continued after a kill."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import TracebackType
from typing import IO

from mmengine.logging import print_log


class Predictions:
    """Answers by item id, in a JSONL file whose first line says what they belong to.

    Args:
        path: The file. What is there is continued if its fingerprint is the same, and renamed to
            ``*.old1`` and so on if not. A torn last line is cut off.
        fingerprint: Identifies weights, questions and prompts.

    Attributes:
        path: The file.
        answers: The answers by item id.
        errors: Why items couldn't be asked, by item id; their answer is empty.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self.answers: dict[str, str] = {}
        self.errors: dict[str, str] = {}
        self._file: IO[str] | None = None

    def __enter__(self) -> Predictions:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._read()
        if whole is None and self.path.exists():
            old = _free_name(self.path)
            print_log(
                f"{self.path} holds answers of other weights or questions; renamed to {old.name}",
                logger="current",
                level=logging.WARNING,
            )
            self.path.replace(old)
        if whole is not None:
            with self.path.open("r+b") as file:
                file.truncate(whole)
        self._file = self.path.open("a", encoding="utf-8")
        if whole is None:
            self._write({"fingerprint": self.fingerprint})
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._file is not None
        self._file.close()

    def add(self, item_id: str, answer: str, *, error: str | None = None) -> None:
        """Write an answer, at once."""
        self.answers[item_id] = answer
        record = {"id": item_id, "prediction": answer}
        if error is not None:
            self.errors[item_id] = record["error"] = error
        self._write(record)

    def _write(self, record: dict[str, str]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def _read(self) -> int | None:
        """Read a file of the same fingerprint; return the length of its whole lines in bytes."""
        if not self.path.exists():
            return None
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        try:
            records = [json.loads(line) for line in content[:whole].splitlines()]
        except ValueError as error:
            raise ValueError(
                f"{self.path} is damaged: {error}; remove it to ask its questions again"
            ) from error
        if not records or records[0].get("fingerprint") != self.fingerprint:
            return None
        # Items that couldn't be read are tried again: a disk may be back by now.
        self.answers = {r["id"]: r["prediction"] for r in records[1:] if "error" not in r}
        return whole


def _free_name(path: Path) -> Path:
    number = 1
    while (old := path.with_name(f"{path.name}.old{number}")).exists():
        number += 1
    return old
