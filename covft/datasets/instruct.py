"""Visual instruction data in LLaVA's format."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mmengine.logging import print_log
from torch.utils.data import Dataset

from covft.conversation import context_text, decoded_spans, encode
from covft.datasets.annotations import (
    Record,
    check_record,
    estimated_length,
    image_paths,
    image_sizes,
    read_annotations,
)
from covft.datasets.sample import BadSample, Sample
from covft.datasets.spec import InputSpec
from covft.datasets.tiling import Resizing, Tiles, checked_resizing, num_squares, squares, stacked
from covft.datasets.transforms import load_image
from covft.registry import DATASETS

_NUM_LISTED = 5


@DATASETS.register_module()
class InstructDataset(Dataset[Sample | BadSample]):
    """Conversations about images.

    A record is ``{"id", "image": path | [paths] | absent, "conversations": [{"from": "human" |
    "gpt", "value"}, …]}``. Only the annotations are read at construction; images are loaded and
    text is tokenised in ``__getitem__``, that is in the loader's workers.

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

    Attributes:
        bad: The samples that construction has left out.
        resize: How images become squares; what inference has to do, too.

    Raises:
        ValueError: If annotations can't be read or no sample is usable.
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
    ) -> None:
        if on_bad not in ("skip", "raise"):
            raise ValueError(f"on_bad must be 'skip' or 'raise', got {on_bad!r}")
        self.spec = spec
        self.image_root = Path(image_root)
        self.resize = checked_resizing(resize, max_tiles)
        self.max_length = max_length
        self.on_bad = on_bad
        self.bad: list[BadSample] = []
        self._records: list[Record] = []
        self._ids: list[str] = []
        self._lengths: list[int] = []
        self._keep_usable(read_annotations(annotations))
        self._report_bad()

    def _keep_usable(self, records: list[Record]) -> None:
        for number, record in enumerate(records):
            sample_id = str(record.get("id", number))
            try:
                check_record(record, template=self.spec.template)
            except ValueError as error:
                self.bad.append(BadSample(sample_id, str(error)))
                continue
            self._records.append(record)
            self._ids.append(sample_id)
            tokens = self._num_squares(record) * self.spec.num_image_tokens
            length = estimated_length(record, num_image_tokens=tokens)
            self._lengths.append(min(length, self.max_length))

    def _report_bad(self) -> None:
        total = len(self.bad) + len(self._records)
        listed = "; ".join(f"'{bad.id}': {bad.reason}" for bad in self.bad[:_NUM_LISTED])
        if not self._records:
            raise ValueError(f"none of {total} samples can be used{listed and ': ' + listed}")
        if not self.bad:
            return
        more = "; …" if len(self.bad) > _NUM_LISTED else ""
        message = f"{len(self.bad)} of {total} samples can't be used: {listed}{more}"
        if self.on_bad == "raise":
            raise ValueError(message)
        print_log(message, logger="current", level=logging.WARNING)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample | BadSample:
        record, sample_id = self._records[index], self._ids[index]
        try:
            return self._load(record, sample_id)
        except ValueError as error:
            if self.on_bad == "raise":
                raise ValueError(f"sample '{sample_id}': {error}") from error
            return BadSample(sample_id, str(error))

    def _load(self, record: Record, sample_id: str) -> Sample:
        images = [load_image(self.image_root / path) for path in image_paths(record)]
        pixels = squares(images, self.spec.image, resize=self.resize_of(record))
        encoded = encode(
            record["conversations"],
            template=self.spec.template,
            tokenizer=self.spec.tokenizer,
            num_image_tokens=[self.spec.num_image_tokens * len(image) for image in pixels],
            max_length=self.max_length,
        )
        return Sample(
            id=sample_id,
            input_ids=encoded.input_ids,
            labels=encoded.labels,
            pixel_values=stacked(pixels, self.spec.image),
            context_text=self._context_text(record),
            num_truncated=encoded.num_truncated,
        )

    def _context_text(self, record: Record) -> str:
        text, suffix = context_text(record["conversations"]), self.spec.context_suffix
        return text if text.endswith(suffix) else text + suffix

    def _num_squares(self, record: Record) -> int:
        """Count the squares of a record's images, or bound them where it doesn't state its sizes.

        Opening every image for the sampler's sake would take hours.
        """
        resize, count = self.resize_of(record), len(image_paths(record))
        if not isinstance(resize, Tiles):
            return count
        share, sizes = resize.share(count), image_sizes(record)
        if sizes is None:
            return count * share.max_squares
        grid = {"tile_size": self.spec.image.image_size, "max_tiles": share.max_tiles}
        return sum(num_squares(width, height, **grid) for width, height in sizes)

    def resize_of(self, record: Record) -> Resizing:
        """Return how a record's images become squares; the dataset's way unless a subclass says."""
        return self.resize

    def record(self, index: int) -> Record:
        """Return the annotation behind an index."""
        return self._records[index]

    def lengths(self) -> list[int]:
        """Return about how many tokens each sample has, for the sampler."""
        return self._lengths

    def has_image(self, index: int) -> bool:
        """Return whether a sample has an image."""
        return bool(image_paths(self._records[index]))

    def describe(self, index: int) -> str:
        """Return a sample as the LLM reads it; «…» marks what is supervised."""
        sample = self[index]
        if isinstance(sample, BadSample):
            return f"[{sample.id}] can't be used: {sample.reason}"
        texts = []
        for span in decoded_spans(sample.input_ids, sample.labels, tokenizer=self.spec.tokenizer):
            if span.num_image_tokens:
                texts.append(f"{span.text}*{span.num_image_tokens}")
            else:
                texts.append(f"«{span.text}»" if span.supervised else span.text)
        cut = f" [{sample.num_truncated} tokens cut]" if sample.num_truncated else ""
        return f"[{sample.id}] " + "".join(texts) + cut
