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
    """Puts samples into one right-padded batch, and sets bad ones aside.

    Args:
        spec: The model's side.
    """

    def __init__(self, spec: InputSpec) -> None:
        self.spec = spec
        pad_token_id = spec.tokenizer.pad_token_id
        # Padding is masked, so that any id does; many LLMs' tokenizers name none.
        self._pad_token_id = 0 if pad_token_id is None else pad_token_id

    def __call__(self, samples: Sequence[Sample | BadSample]) -> dict[str, Any]:
        """Return a batch of B good samples with I images; of tiled ones, every tile is one.

        Args:
            samples: What the dataset gave.

        Returns:
            ``input_ids``, ``labels`` (B, T); ``attention_mask`` (B, T) bool; ``pixel_values``
            (I, 3, S, S) uint8; ``image_to_sample`` (I,); with a context tokenizer ``context_ids``
            (B, L) and ``context_mask`` (B, L) bool; ``sample_ids`` and ``bad_samples``, lists.
            Without any good sample B is 0, T and L are 1.
        """
        good = [sample for sample in samples if isinstance(sample, Sample)]
        size = self.spec.image.image_size
        pixels = [sample.pixel_values for sample in good]
        num_images = torch.tensor([len(p) for p in pixels], dtype=torch.long)
        lengths = torch.tensor([len(sample.input_ids) for sample in good], dtype=torch.long)
        input_ids = _padded([sample.input_ids for sample in good], self._pad_token_id)
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "labels": _padded([sample.labels for sample in good], IGNORE_INDEX),
            "attention_mask": torch.arange(input_ids.shape[1]) < lengths[:, None],
            "pixel_values": torch.cat([torch.empty(0, 3, size, size, dtype=torch.uint8), *pixels]),
            "image_to_sample": torch.arange(len(good)).repeat_interleave(num_images),
            "sample_ids": [sample.id for sample in good],
            "bad_samples": [sample for sample in samples if isinstance(sample, BadSample)],
        }
        batch.update(self._context([sample.context_text for sample in good]))
        return batch

    def _context(self, texts: list[str]) -> dict[str, Tensor]:
        tokenizer = self.spec.context_tokenizer
        if tokenizer is None:
            return {}
        if not texts:
            return {
                "context_ids": torch.empty(0, 1, dtype=torch.long),
                "context_mask": torch.empty(0, 1, dtype=torch.bool),
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


def _padded(rows: list[Tensor], value: int) -> Tensor:
    if not rows:
        return torch.empty(0, 1, dtype=torch.long)
    return pad_sequence(rows, batch_first=True, padding_value=value)
