"""Some annotations as a dataset reads them: a file or a list, its images' folder, its name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from covft.datasets.annotations import Record, RecordCheck, image_paths
from covft.datasets.record_file import RecordFile
from covft.datasets.record_index import RecordIndex
from covft.datasets.sample import BadSample


class RecordSource:
    """Annotations of which one record at a time is in memory, if they come from a file.

    Args:
        annotations: A .json or .jsonl file, or records.
        check: Decides which can be used.
        root: Folder that the images' paths are relative to; put before them.
        name: Put before every id, with a slash; empty for none.
        first_number: What the first record is called that states no id.

    Attributes:
        index: What is known of every record.

    Raises:
        ValueError: If the annotations can't be read.
    """

    def __init__(
        self,
        annotations: str | Sequence[Record],
        check: RecordCheck,
        *,
        root: str = "",
        name: str = "",
        first_number: int = 0,
    ) -> None:
        self.check, self.root = check, root
        self._prefix, self._first_number = name and f"{name}/", first_number
        self._file = RecordFile(annotations) if isinstance(annotations, str) else None
        self._records = () if isinstance(annotations, str) else annotations
        if self._file is None:
            self.index = RecordIndex.of_records(self._records, check)
        else:
            self.index = RecordIndex.of_file(self._file, check)

    def __len__(self) -> int:
        """Return the number of records, usable or not."""
        return len(self.index.rows)

    def usable(self, *, repeat: float = 1.0) -> np.ndarray:
        """Return the numbers of the records that can be used, (n,) int32.

        Args:
            repeat: Below 1, only that part of the records is looked at, from the first on; above,
                they come that often, a whole number.
        """
        numbers = np.flatnonzero(self.index.rows["usable"][: self._limit(repeat)])
        return np.tile(numbers.astype(np.int32), max(int(repeat), 1))

    def bad(self, *, repeat: float = 1.0) -> list[BadSample]:
        """Return the records that can't be used, each once, see :meth:`usable`."""
        return [
            BadSample(self._id(bad.number, bad.id), bad.reason)
            for bad in self.index.bad
            if bad.number < self._limit(repeat)
        ]

    def record(self, number: int) -> Record:
        """Return a record with its whole id, and its images' folder before their paths.

        Raises:
            RuntimeError: If its file has changed or can't be read any more.
        """
        if self._file is None:
            record = self._records[number]
        else:
            row = self.index.rows[number]
            record = self._file.read(int(row["start"]), int(row["size"]))
            if not isinstance(record, Mapping):
                raise self._file.changed()
        changes: dict[str, Any] = {"id": self._id(number, record.get("id"))}
        if self.root:
            changes["image"] = [str(Path(self.root) / path) for path in image_paths(record)]
        return {**record, **changes}

    def fingerprint(self) -> str:
        """Return what tells these annotations from others, and from their former state."""
        if self._file is not None:
            return repr((str(self._file.path.absolute()), self._file.state, self.root))
        content = json.dumps([self._records, self.root], sort_keys=True, default=repr)
        return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()

    def _limit(self, repeat: float) -> int:
        return int(len(self) * repeat) if repeat < 1 else len(self)

    def _id(self, number: int, stated: Any) -> str:
        return f"{self._prefix}{self._first_number + number if stated is None else stated}"
