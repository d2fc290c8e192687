"""Files of answers: written as they come, continued after a kill, merged from several processes.

A file is JSONL. Its first line says what the answers belong to (weights, model, template, length
limit, …), every other one holds an item's id, a digest of what was asked, the answer and, where the
item couldn't be asked, the reason. Processes that share the work write ``name.rank0-of-2.jsonl``
and so on beside ``name.jsonl``, into which the first of them merges all.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from filelock import FileLock, Timeout
from mmengine.logging import print_log

from covft.atomic import atomic_write_text, set_aside
from covft.config import changed_lines
from covft.evaluation.benchmark import Benchmark, Item

#: A power cut loses at most the answers of so many seconds; a killed process loses none.
_SECONDS_BETWEEN_FLUSHES = 2.0
#: Longer parts of a fingerprint are told apart by their digests.
_MAX_SHOWN = 64

Fingerprint = Mapping[str, str]


@dataclass(frozen=True)
class Record:
    """An item's answer.

    Attributes:
        id: The item's.
        asked: Digest of what was asked, see :func:`asked_digests`.
        prediction: The answer; empty if the item couldn't be asked.
        error: Why it couldn't.
    """

    id: str
    asked: str
    prediction: str
    error: str | None = None

    def line(self) -> str:
        """Return the record as a line of a file."""
        fields = {key: value for key, value in asdict(self).items() if value is not None}
        return json.dumps(fields, ensure_ascii=False) + "\n"


class PredictionWriter:
    """Appends answers to a file; what it was given is kept, whenever the process is killed.

    Args:
        path: The file; a torn last line of it must have been removed, as :func:`gather` does.
        fingerprint: Written as the first line of a new file.
    """

    def __init__(self, path: Path, fingerprint: Fingerprint) -> None:
        self.path, self.fingerprint = path, fingerprint
        self._file: IO[str] | None = None
        self._flushed = 0.0

    def __enter__(self) -> PredictionWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")
        if self._file.tell() == 0:
            self._file.write(_header(self.fingerprint))
            self._file.flush()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def add(self, records: Iterable[Record]) -> None:
        """Write answers, at once."""
        assert self._file is not None
        self._file.write("".join(record.line() for record in records))
        self._file.flush()
        if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
            os.fsync(self._file.fileno())
            self._flushed = time.monotonic()


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Keep other runs from writing a file of answers, and from renaming it, meanwhile.

    The lock ends with the process, however that ends.

    Args:
        path: The file; the first of the processes that share its questions holds it for all.

    Raises:
        ValueError: If another run is writing the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.parent / f".{path.name}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"{path} is being written by another run; wait for it, or give another --work-dir"
        ) from error
    try:
        yield
    finally:
        lock.release()


def asked_digests(benchmark: Benchmark) -> dict[str, str]:
    """Return a digest of what each item asks, by id: question, context and images' names.

    Images inside the benchmark's folder, or in one beside it, are named from there, so that the
    data can be moved.

    Raises:
        ValueError: If two items have one id.
    """
    digests: dict[str, str] = {}
    for item in benchmark.items():
        if item.id in digests:
            raise ValueError(
                f"{benchmark.name}: two items have the id '{item.id}'; predictions are kept by id"
            )
        digests[item.id] = _digest(item, benchmark.root)
    return digests


def shard_path(path: Path, *, rank: int, world_size: int) -> Path:
    """Return the file that one of several processes writes, ``path`` itself if there is one."""
    if world_size == 1:
        return path
    return path.with_name(f"{path.stem}.rank{rank}-of-{world_size}{path.suffix}")


def read_predictions(path: Path) -> dict[str, str]:
    """Return the answers in a file, by item id.

    Raises:
        ValueError: If there is no such file, or it is damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path} not found; answer the questions first (--phase infer)")
    return {record.id: record.prediction for record in _read(path)[1]}


def read_fingerprint(path: Path) -> dict[str, str]:
    """Return what a file's answers, and those of the processes' files beside it, belong to.

    Raises:
        ValueError: If there is no such file, one is damaged, or two belong to different things.
    """
    held: dict[str, str] | None = None
    for file in _files(path):
        found = _read(file)[0]
        if held is not None and (differences := _differences(found, held)):
            raise ValueError(
                f"{file} and the files beside it don't belong together:\n{differences}\n"
                "answer the questions again (--phase infer)"
            )
        held = found if held is None else held
    if held is None:
        raise ValueError(f"{path} not found; answer the questions first (--phase infer)")
    return held


def abridged(fingerprint: Fingerprint) -> dict[str, str]:
    """Return a fingerprint with digests for its long parts, as results hold it."""
    return {key: _abridged(str(value)) for key, value in fingerprint.items()}


def load(
    path: Path, expected: Fingerprint, asked: Mapping[str, str], *, with_parts: bool = True
) -> dict[str, Record]:
    """Return the records of a file and of the processes' files beside it, without changing any.

    Args:
        path: The file.
        expected: What its fingerprint must hold; parts that are left out may have any value.
        asked: The items' digests by id; records of other items are left out.
        with_parts: Whether to read the processes' files, too.

    Raises:
        ValueError: If there is none, one is damaged, or one belongs to something else; it says in
            what they differ.
    """
    files = _files(path) if with_parts else [path]
    if not files:
        raise ValueError(f"{path} not found; answer the questions first (--phase infer)")
    records: dict[str, Record] = {}
    for file in files:
        fingerprint, found = _read(file)
        differences = _differences(fingerprint, expected) or _other_questions(found, asked)
        if differences:
            raise ValueError(
                f"{file} doesn't hold answers to this:\n{differences}\n"
                "score what it was made from, or answer the questions again (--phase infer)"
            )
        _merge(records, found)
    return {key: record for key, record in records.items() if key in asked}


def gather(
    path: Path, fingerprint: Fingerprint, asked: Mapping[str, str], *, keep_errors: bool
) -> dict[str, Record]:
    """Merge a file and the processes' files beside it into one, each item once, in their order.

    Files with another fingerprint, or answers to other questions, are renamed to ``*.old1`` and so
    on. A torn last line is dropped. Only one process may do this, while none writes.

    Args:
        path: The file.
        fingerprint: What its answers must belong to.
        asked: The items' digests by id, in their order; records of other items are kept behind.
        keep_errors: Keep items that couldn't be asked, instead of forgetting them so that they are
            tried again: a disk may be back by now.

    Returns:
        The records by id.

    Raises:
        ValueError: If a file is damaged.
    """
    records: dict[str, Record] = {}
    files = _files(path)
    for file in files:
        found_print, found = _read(file)
        differences = _differences(found_print, fingerprint) or _other_questions(found, asked)
        if differences:
            _set_aside(file, differences)
        else:
            _merge(records, found)
    if not keep_errors:
        records = {key: record for key, record in records.items() if record.error is None}
    order = [
        *(key for key in asked if key in records),
        *(key for key in records if key not in asked),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = _header(fingerprint) + "".join(records[key].line() for key in order)
    atomic_write_text(path, text)
    for file in files:
        if file != path:
            file.unlink(missing_ok=True)
    return records


def _files(path: Path) -> list[Path]:
    """Return the file and the processes' files that are there."""
    shards = path.parent.glob(f"{glob.escape(path.stem)}.rank*-of-*{path.suffix}")
    return [file for file in (path, *sorted(shards)) if file.is_file()]


def _read(path: Path) -> tuple[dict[str, Any] | None, list[Record]]:
    """Read a file's whole lines: its fingerprint, None if it has no line, and its records."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
        if not rows:
            return None, []
        fingerprint = rows[0]["fingerprint"]
        if not isinstance(fingerprint, dict):  # of another version
            return {}, []
        return fingerprint, [Record(**row) for row in rows[1:]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged: {error}; remove it to ask its questions again"
        ) from error


def _merge(records: dict[str, Record], found: Iterable[Record]) -> None:
    for record in found:
        held = records.get(record.id)
        if held is None or held.error is not None:
            records[record.id] = record


def _header(fingerprint: Fingerprint) -> str:
    return json.dumps({"fingerprint": dict(fingerprint)}, ensure_ascii=False) + "\n"


def _abridged(value: str) -> str:
    if len(value) <= _MAX_SHOWN and "\n" not in value:
        return value
    return f"sha256:{hashlib.sha256(value.encode()).hexdigest()[:16]}"


def _digest(item: Item, root: Path) -> str:
    images = [_from_root(image, root) for image in item.images]
    text = json.dumps([item.question, item.context, images])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _from_root(image: str, root: Path) -> str:
    inside, beside = f"{root}{os.sep}", f"{root.parent}{os.sep}"
    if image.startswith(inside):
        return image[len(inside) :]
    # OK-VQA's images may be COCO's, in a folder beside its own.
    return f"../{image[len(beside) :]}" if image.startswith(beside) else image


def _differences(found: Mapping[str, Any] | None, expected: Fingerprint) -> str:
    """Return in lines what differs between two fingerprints; "" if nothing does."""
    if found is None:
        return ""
    if not found:
        return "it was written by another version"
    lines = []
    for key, value in expected.items():
        before = found.get(key)
        if before == value:
            continue
        if before is not None and "\n" in before + value:
            lines += [f"{key}:", *changed_lines(before, value)]
        else:
            lines.append(f"{key}: {before} in the file, {value} here")
    return "\n".join(lines)


def _other_questions(found: Iterable[Record], asked: Mapping[str, str]) -> str:
    # What couldn't be asked may have had no question yet: a mended row is no other question.
    other = [
        record.id
        for record in found
        if record.error is None and record.asked != asked.get(record.id, record.asked)
    ]
    if not other:
        return ""
    return (
        f"{len(other)} of its items were asked something else than now (another question, context "
        f"or image), the first is '{other[0]}'"
    )


def _set_aside(path: Path, differences: str) -> None:
    ((_, old),) = set_aside([path])
    print_log(
        f"{path} doesn't hold answers to this; renamed to {old.name}:\n{differences}",
        logger="current",
        level=logging.WARNING,
    )
