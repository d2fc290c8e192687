"""Visual instruction data in LLaVA's format."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from mmengine.logging import print_log

from covft.conversation import Encoded, context_text, encode
from covft.datasets.annotations import (
    BYTES_PER_TOKEN,
    Record,
    RecordCheck,
    image_paths,
    image_sizes,
)
from covft.datasets.base import ConversationDataset, Sizes
from covft.datasets.record_source import RecordSource
from covft.datasets.sample import BadSample, Sample
from covft.datasets.spec import InputSpec
from covft.datasets.subset import checked_fraction, subset
from covft.datasets.tiling import Tiles, checked_resizing, squares, stacked
from covft.datasets.token_lengths import UNREADABLE, UNUSABLE, array_key, measured_sizes
from covft.images import image_size, load_image
from covft.registry import DATASETS

_NUM_LISTED = 5


@DATASETS.register_module()
class InstructDataset(ConversationDataset):
    """Conversations about images.

    A record is ``{"id", "image": path | [paths] | absent, "conversations": [{"from": "human" |
    "gpt", "value"}, …]}``. Construction goes through the annotations once and keeps what it has
    found in the cache folder; records are read, images loaded and text tokenised in
    ``__getitem__``, that is in the loader's workers.

    Args:
        annotations: A .json or .jsonl file, or a list of files and records.
        spec: The model's side.
        image_root: Folder that the images' paths are relative to.
        resize: ``crop``, ``stretch``, ``pad`` or ``tiles`` instead of the encoder's own way.
        max_tiles: With ``resize="tiles"``: how many a sample has at most, see
            :class:`covft.datasets.Tiles`.
        max_length: Longest conversation in tokens, images included.
        on_bad: What happens to samples that can't be used. ``skip``: those found at construction
            are listed in ``bad`` and left out, those found at loading are returned as
            :class:`BadSample`, which the collator leaves out and lists. ``raise``: ValueError.
        fraction: Share of the usable samples that is used, chosen at random once and for all; a
            smaller share is a part of a larger one.
        fraction_seed: Of that choice, 0 by default; only for a fraction below 1.

    Raises:
        ValueError: If annotations can't be read or no sample is usable.
        RuntimeError: From ``__getitem__``, whatever ``on_bad`` says: if an annotation file has
            changed since construction.
    """

    def __init__(
        self,
        annotations: str | Sequence[str | Record],
        *,
        spec: InputSpec,
        image_root: str = "",
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
        self._set_up(
            [(source, 1.0) for source in _sources(annotations, check)],
            check,
            spec=spec,
            image_root=image_root,
            max_length=max_length,
            on_bad=on_bad,
            fraction=fraction,
            fraction_seed=fraction_seed,
        )

    def _set_up(
        self,
        sources: Sequence[tuple[RecordSource, float]],
        check: RecordCheck,
        *,
        spec: InputSpec,
        max_length: int,
        on_bad: str,
        fraction: float,
        fraction_seed: int | None,
        image_root: str = "",
    ) -> None:
        """Take over sources, each as often as said, and the options that datasets share."""
        if on_bad not in ("skip", "raise"):
            raise ValueError(f"on_bad must be 'skip' or 'raise', got {on_bad!r}")
        checked_fraction(fraction, fraction_seed)
        self.spec, self.resize, self.image_root = spec, check.resize, Path(image_root)
        self.max_length, self.on_bad = max_length, on_bad
        self._sources = [source for source, _ in sources]
        #: Of every source the number of its first record among all sources'.
        self._firsts = np.cumsum([0, *(len(source) for source in self._sources)])[:-1]
        used = [
            (source.usable(repeat=repeat) + first).astype(np.int32)
            for (source, repeat), first in zip(sources, self._firsts, strict=True)
        ]
        self._numbers = np.concatenate(used) if used else np.empty(0, np.int32)
        self.bad = [bad for source, repeat in sources for bad in source.bad(repeat=repeat)]
        self._report_bad()
        if fraction < 1:
            chosen = subset(len(self._numbers), fraction, seed=fraction_seed or 0)
            self._numbers = self._numbers[chosen]

    def _report_bad(self) -> None:
        total = len(self.bad) + len(self._numbers)
        listed = "; ".join(f"'{bad.id}': {bad.reason}" for bad in self.bad[:_NUM_LISTED])
        if not len(self._numbers):
            raise ValueError(f"none of {total} samples can be used{listed and ': ' + listed}")
        if not self.bad:
            return
        more = "; …" if len(self.bad) > _NUM_LISTED else ""
        message = f"{len(self.bad)} of {total} samples can't be used: {listed}{more}"
        if self.on_bad == "raise":
            raise ValueError(message)
        print_log(message, logger="current", level=logging.WARNING)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Sample | BadSample:
        sample_id = str(index)
        try:
            record = self.record(index)
            sample_id = record["id"]
            return self._load(record, self._located(index)[0].check)
        except ValueError as error:
            if self.on_bad == "raise":
                raise ValueError(f"sample '{sample_id}': {error}") from error
            return BadSample(sample_id, str(error))

    def _load(self, record: Record, check: RecordCheck) -> Sample:
        images = [load_image(self.image_root / path) for path in image_paths(record)]
        pixels = squares(images, self.spec.image, resize=check.resize)
        encoded = self._encoded(record, [len(image) for image in pixels])
        return Sample(
            id=record["id"],
            input_ids=encoded.input_ids,
            labels=encoded.labels,
            pixel_values=stacked(pixels, self.spec.image),
            context_text=self._context_text(record),
            num_truncated=encoded.num_truncated,
        )

    def _encoded(self, record: Record, num_squares: Sequence[int]) -> Encoded:
        return encode(
            record["conversations"],
            template=self.spec.template,
            tokenizer=self.spec.tokenizer,
            num_image_tokens=[self.spec.num_image_tokens * count for count in num_squares],
            max_length=self.max_length,
        )

    def _context_text(self, record: Record) -> str:
        text, suffix = context_text(record["conversations"]), self.spec.context_suffix
        return text if text.endswith(suffix) else text + suffix

    def _located(self, index: int) -> tuple[RecordSource, int]:
        """Return the source of a sample, and the number of its record there."""
        number = int(self._numbers[index])
        source = int(np.searchsorted(self._firsts, number, side="right")) - 1
        return self._sources[source], number - int(self._firsts[source])

    def record(self, index: int) -> Record:
        """Return the annotation behind an index; its ``id`` is the sample's."""
        source, number = self._located(index)
        return source.record(number)

    def has_images(self) -> np.ndarray:
        """Return whether each sample has an image, (N,) bool."""
        return self._column("num_images") > 0

    def sizes(self) -> Sizes:
        """Return about how large samples are, without tokenising them."""
        num_squares = self._column("num_squares")
        text = -(-self._column("num_bytes") // BYTES_PER_TOKEN)
        tokens = np.minimum(text + num_squares * self.spec.num_image_tokens, self.max_length)
        return Sizes(tokens, num_squares)

    def _column(self, name: str) -> np.ndarray:
        columns = [source.index.rows[name] for source in self._sources]
        return np.concatenate(columns).astype(np.int64)[self._numbers]

    def exact_sizes(self, *, num_workers: int = 0, rank: int = 0, world_size: int = 1) -> Sizes:
        """Return how large samples are; see :meth:`ConversationDataset.exact_sizes`."""
        found = measured_sizes(self, num_workers=num_workers, rank=rank, world_size=world_size)
        return Sizes(found[:, 0], found[:, 1])

    def exact_size(self, index: int) -> tuple[int, int]:
        """Return a sample's tokens and squares without decoding its images.

        Sizes of images that are cut into tiles are those that the annotation states, or else in the
        files' headers.

        Returns:
            Tokens and squares; ``UNUSABLE`` if the record can't be used, ``UNREADABLE`` if an image
            file can't be opened, see :mod:`covft.datasets.token_lengths`.

        Raises:
            RuntimeError: If the annotation file has changed.
        """
        source, number = self._located(index)
        record = source.record(number)
        try:
            sizes = self._image_sizes(record, source.check)
        except ValueError:
            return UNREADABLE
        try:
            num_squares = source.check.squares(sizes)
            return len(self._encoded(record, num_squares).input_ids), sum(num_squares)
        except ValueError:
            return UNUSABLE

    def _image_sizes(self, record: Record, check: RecordCheck) -> list[tuple[int, int]]:
        paths = image_paths(record)
        if not isinstance(check.resize, Tiles):
            return [(1, 1)] * len(paths)
        return image_sizes(record) or [image_size(self.image_root / path) for path in paths]

    def fingerprint(self) -> str:
        """Return what the exact sizes depend on, the tokenizer left out."""
        sources = [(source.fingerprint(), repr(source.check)) for source in self._sources]
        numbers = array_key(self._numbers)
        tokens = (self.spec.num_image_tokens, self.max_length, str(self.image_root))
        return repr((sources, numbers, tokens))


def _sources(annotations: str | Sequence[str | Record], check: RecordCheck) -> list[RecordSource]:
    """Open the files and put the records between them together."""
    sources: list[RecordSource] = []
    count = 0
    pending: list[Record] = []

    def add(found: str | list[Record]) -> None:
        nonlocal count
        sources.append(RecordSource(found, check, first_number=count))
        count += len(sources[-1])

    for item in [annotations] if isinstance(annotations, str) else annotations:
        if not isinstance(item, str):
            pending.append(item)
            continue
        if pending:
            add(pending)
            pending = []
        add(item)
    if pending:
        add(pending)
    return sources
