"""What the engine asks of a training set."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from covft.conversation import decoded_spans
from covft.datasets.annotations import Record
from covft.datasets.sample import BadSample, Sample
from covft.datasets.spec import InputSpec
from covft.datasets.tiling import Resizing


class Sizes(NamedTuple):
    """How large samples are.

    Attributes:
        tokens: Of each sample in the LLM, images included, (N,).
        squares: Images of each, or their tiles, (N,).
    """

    tokens: np.ndarray
    squares: np.ndarray


class ConversationDataset(Dataset[Sample | BadSample]):
    """Conversations about images, by number.

    Attributes:
        spec: The model's side.
        resize: How images become squares; what inference has to do, too.
        image_root: Folder that the image paths of :meth:`record` are relative to.
        bad: The samples that construction has left out.
    """

    spec: InputSpec
    resize: Resizing
    image_root: Path
    bad: list[BadSample]

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples."""

    @abstractmethod
    def record(self, index: int) -> Record:
        """Return the annotation behind an index; its ``id`` is the sample's."""

    @abstractmethod
    def has_images(self) -> np.ndarray:
        """Return whether each sample has an image, (N,) bool."""

    @abstractmethod
    def sizes(self) -> Sizes:
        """Return about how large samples are, without tokenising them.

        Of tiled images whose annotation states no size, the most tiles are counted.
        """

    @abstractmethod
    def exact_sizes(self, *, num_workers: int = 0, rank: int = 0, world_size: int = 1) -> Sizes:
        """Return how large samples are, which takes tokenising them once; it's kept in the cache.

        A sample that turns out to be unusable has size 0. Processes may find different ones where
        image files can only be opened at times; :func:`covft.engine.build_dataloader` makes
        them agree.

        Args:
            num_workers: Processes that tokenise, 0 for this one.
            rank: This process of a distributed run.
            world_size: All of them; each does its part of the work.
        """

    def lengths(self) -> np.ndarray:
        """Return about how many tokens each sample has, (N,)."""
        return self.sizes().tokens

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
