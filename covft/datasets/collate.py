"""From samples to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from covft.conversation import IGNORE_INDEX
from covft.datasets.sample import BadSample, Sample
from covft.datasets.spec import InputSpec


class Collator:
    """Puts samples into one micro-batch, and sets bad ones aside.

    A micro-batch without any good sample is one row of one token that nothing is learnt from, so
    that a process in this situation runs the same modules as the others.

    Args:
        spec: The model's side.
        pack: Put the samples side by side in one row without padding, instead of one row each.
    """

    def __init__(self, spec: InputSpec, *, pack: bool = False) -> None:
        self.spec = spec
        self.pack = pack
        pad_token_id = spec.tokenizer.pad_token_id
        # Padding is masked, so that any id does; many LLMs' tokenizers name none.
        self._pad_token_id = 0 if pad_token_id is None else pad_token_id

    def __call__(self, samples: Sequence[Sample | BadSample]) -> dict[str, Any]:
        """Return a batch of B good samples with I images; of tiled ones, every tile is one.

        Args:
            samples: What the dataset gave.

        Returns:
            ``pixel_values`` (I, 3, S, S) uint8; ``image_to_sample`` (I,); with a context tokenizer
            ``context_ids`` (B, L) and ``context_mask`` (B, L) bool; ``sample_ids`` and
            ``bad_samples``, lists; and the text, padded on the right: ``input_ids``, ``labels``
            (B, T), ``attention_mask`` (B, T) bool.
            Packed, that is ``input_ids``, ``labels`` and ``position_ids`` (1, T), T being the sum
            of the samples' lengths, and ``cu_seqlens`` (B + 1,) int32, where each begins and the
            last one ends. Positions count from 0 in each sample, whose first label is ignored: it
            would follow from the sample before.
            Without any good sample the text is that of B = 1, and ``sample_ids`` is empty.
        """
        good = [sample for sample in samples if isinstance(sample, Sample)]
        size = self.spec.image.image_size
        pixels = [sample.pixel_values for sample in good]
        num_images = torch.tensor([len(p) for p in pixels], dtype=torch.long)
        ids = [sample.input_ids for sample in good] or [torch.tensor([self._pad_token_id])]
        labels = [sample.labels for sample in good] or [torch.tensor([IGNORE_INDEX])]
        return {
            **(_packed(ids, labels) if self.pack else self._padded(ids, labels)),
            "pixel_values": torch.cat([torch.empty(0, 3, size, size, dtype=torch.uint8), *pixels]),
            "image_to_sample": torch.arange(len(good)).repeat_interleave(num_images),
            "sample_ids": [sample.id for sample in good],
            "bad_samples": [sample for sample in samples if isinstance(sample, BadSample)],
            **self._context([sample.context_text for sample in good]),
        }

    def _padded(self, ids: list[Tensor], labels: list[Tensor]) -> dict[str, Tensor]:
        input_ids = pad_sequence(ids, batch_first=True, padding_value=self._pad_token_id)
        lengths = torch.tensor([len(row) for row in ids])
        return {
            "input_ids": input_ids,
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": torch.arange(input_ids.shape[1]) < lengths[:, None],
        }

    def _context(self, texts: list[str]) -> dict[str, Tensor]:
        tokenizer = self.spec.context_tokenizer
        if tokenizer is None:
            return {}
        if not texts:  # no image will ask for this row; encoders can't do with none
            return {
                "context_ids": torch.zeros(1, 1, dtype=torch.long),
                "context_mask": torch.ones(1, 1, dtype=torch.bool),
            }
        encoded = tokenizer(
            texts,
            padding=True,
            padding_side="right",  # Llama's pad on the left; the first token may stand for all
            truncation=True,
            max_length=self.spec.max_context_length,
            return_tensors="pt",
        )
        return {
            "context_ids": encoded["input_ids"],
            "context_mask": encoded["attention_mask"].bool(),
        }


def _packed(ids: list[Tensor], labels: list[Tensor]) -> dict[str, Tensor]:
    lengths = torch.tensor([len(row) for row in ids])
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    targets = torch.cat(labels)  # a copy, also of a single one
    targets[bounds[:-1]] = IGNORE_INDEX
    return {
        "input_ids": torch.cat(ids)[None],
        "labels": targets[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in ids])[None],
        "cu_seqlens": bounds.to(torch.int32),
    }
