"""Exact sizes of samples, found by tokenising a set once; kept in the cache folder.

The work is cut into chunks, each written as soon as it's done: a killed run goes on where it was.
Ranks that share a cache folder begin with a part each and then help with what is missing, so that
none waits for another; ranks that don't share one do all of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from mmengine.logging import print_log
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from covft.datasets.spec import InputSpec
from covft.weights.cache import cache_root

#: Changes whenever tokenising does.
_FORMAT = 2
CHUNK = 4096
#: Sizes of a sample that its record makes unusable: it always will be.
UNUSABLE = (0, 0)
#: Sizes of a sample of which a file couldn't be opened: at the next start, perhaps it can.
UNREADABLE = (-1, -1)
_SECONDS_BETWEEN_LOGS = 10.0


class Measurable(Protocol):
    """A dataset whose samples can be measured."""

    spec: InputSpec

    def __len__(self) -> int:
        """Return the number of samples."""

    def exact_size(self, index: int) -> tuple[int, int]:
        """Return a sample's tokens and squares, or ``UNUSABLE`` or ``UNREADABLE``."""

    def fingerprint(self) -> str:
        """Return what the sizes depend on, the tokenizer left out."""


def measured_sizes(
    dataset: Measurable, *, num_workers: int = 0, rank: int = 0, world_size: int = 1
) -> np.ndarray:
    """Return the sizes of all samples, from the cache or by tokenising them.

    Args:
        dataset: The samples.
        num_workers: Processes that tokenise, 0 for this one.
        rank: This process of a distributed run.
        world_size: All of them.

    Returns:
        Tokens and squares, (N, 2) int64; 0 for samples that can't be used.
    """
    folder = _writable(cache_root() / "token_lengths" / _key(dataset))
    chunks = _Chunks(dataset, folder)
    found: dict[int, np.ndarray] = {}
    if folder is not None:
        found = {
            number: rows
            for number in range(len(chunks))
            if (rows := chunks.kept(number)) is not None
        }
    missing = [number for number in range(len(chunks)) if number not in found]
    if missing:
        own = missing[rank::world_size] if folder is not None else missing
        others = sorted(set(missing) - set(own), reverse=True)
        for number, rows in _worked(chunks, [*own, *others], num_workers, world_size):
            found[number] = rows
    sizes = np.concatenate([found[number] for number in range(len(chunks))]).astype(np.int64)
    _report(sizes[:, 0])
    return np.maximum(sizes, 0)


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what tells a tokenizer from others: two of one key make the same of every text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = tokenizer.name_or_path
    if backend is not None:
        state = json.loads(backend.to_str())
        # Left behind by the last call, whoever made it; every call sets them anew.
        for option in ("padding", "truncation"):
            state.pop(option, None)
        content = json.dumps(state, sort_keys=True)
    # Some tokens that it puts in front are decided in Python, not in the backend.
    parts = [type(tokenizer).__name__, content, tokenizer("")["input_ids"]]
    return _digest(json.dumps(parts))


def array_key(array: np.ndarray) -> str:
    """Return what tells an array from others."""
    return _digest(f"{array.dtype} {array.shape} ", array.tobytes())


def _key(dataset: Measurable) -> str:
    parts = [
        _FORMAT,
        CHUNK,
        tokenizer_key(dataset.spec.tokenizer),
        repr(dataset.spec.template),
        dataset.fingerprint(),
    ]
    return _digest(json.dumps(parts))[:32]


def _digest(text: str, content: bytes = b"") -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass") + content).hexdigest()


def _writable(folder: Path) -> Path | None:
    """Return the folder after making it; None, and a warning, if that's impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"no permission to write into {folder}")
    except OSError as error:
        print_log(
            f"token lengths can't be kept ({error}), so that every process finds them anew; set "
            "COVFT_CACHE to a folder that can be written",
            logger="current",
            level=logging.WARNING,
        )
        return None
    return folder


class _Chunks(Dataset[tuple[int, np.ndarray]]):
    """Sizes of a set's samples, some thousands at a time."""

    def __init__(self, dataset: Measurable, folder: Path | None) -> None:
        self._dataset, self._folder = dataset, folder

    def __len__(self) -> int:
        return -(-len(self._dataset) // CHUNK)

    def __getitem__(self, number: int) -> tuple[int, np.ndarray]:
        # Another process may have done it meanwhile.
        before = self._loaded(number)
        members = self._members(number)
        rows = np.full((len(members), 2), UNREADABLE, dtype=np.int32) if before is None else before
        unknown = np.flatnonzero(rows[:, 0] < 0).tolist()
        for place in unknown:
            rows[place] = self._dataset.exact_size(members[place])
        if before is None or (rows[unknown] >= 0).any():
            self._keep(number, rows)
        return number, rows

    def num_samples(self, number: int) -> int:
        """Return how many samples a chunk has."""
        return len(self._members(number))

    def kept(self, number: int) -> np.ndarray | None:
        """Return a chunk that is in the cache whole, all of its samples known."""
        rows = self._loaded(number)
        return None if rows is None or (rows < 0).any() else rows

    def _loaded(self, number: int) -> np.ndarray | None:
        if self._folder is None:
            return None
        try:
            rows: np.ndarray = np.load(self._folder / f"{number:06d}.npy")
        except (OSError, ValueError, EOFError):
            return None
        return rows if rows.shape == (len(self._members(number)), 2) else None

    def _keep(self, number: int, rows: np.ndarray) -> None:
        if self._folder is None:
            return
        partial = self._folder / f".{number:06d}.{os.getpid()}.partial.npy"
        try:
            np.save(partial, rows)
            partial.replace(self._folder / f"{number:06d}.npy")
        except OSError as error:  # a full disk: this run goes on, the next begins here again
            partial.unlink(missing_ok=True)
            print_log(f"token lengths can't be kept: {error}", level=logging.WARNING)

    def _members(self, number: int) -> range:
        return range(number * CHUNK, min((number + 1) * CHUNK, len(self._dataset)))


def _report(tokens: np.ndarray) -> None:
    """Log how many samples can't be used."""
    unusable, unreadable = int((tokens == 0).sum()), int((tokens < 0).sum())
    if unusable or unreadable:
        print_log(
            f"token lengths: {unusable + unreadable:,} of {len(tokens):,} samples can't be used, "
            f"{unusable:,} for what their records hold and {unreadable:,} since an image can't be "
            "opened; the latter are tried again at the next start",
            logger="current",
            level=logging.WARNING,
        )


def _worked(
    chunks: _Chunks, order: Sequence[int], num_workers: int, world_size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Work on chunks in their order, and say how far it is."""
    loader = DataLoader(
        chunks,
        batch_size=None,
        sampler=order,
        num_workers=min(num_workers, len(order)),
        collate_fn=_unchanged,
        # Iterating draws a seed for the workers, which must not come out of the run's own state.
        generator=torch.Generator(),
    )
    total, done = sum(chunks.num_samples(number) for number in order), 0
    print_log(
        f"token lengths: {total:,} samples to tokenise, {max(num_workers, 1)} processes"
        + (f" on each of {world_size} ranks" if world_size > 1 else ""),
        logger="current",
    )
    started = said = time.perf_counter()
    for number, rows in loader:
        yield number, rows
        done += len(rows)
        now = time.perf_counter()
        if now - said >= _SECONDS_BETWEEN_LOGS or done == total:
            said = now
            left = (now - started) * (total - done) / done
            print_log(
                f"token lengths: {done:,} of {total:,} samples, about {left:.0f} s left",
                logger="current",
            )


def _unchanged(found: Any) -> Any:
    return found
