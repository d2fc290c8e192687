"""What a dataset gives for an index."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BadSample:
    """A sample that can't be used, and why."""

    id: str
    reason: str


@dataclass(frozen=True)
class Sample:
    """A conversation ready for the collator.

    Attributes:
        id: The annotation's id.
        input_ids: (T,); image tokens are ``IMAGE_TOKEN_ID``.
        labels: (T,); ``IGNORE_INDEX`` where unsupervised.
        pixel_values: (I, 3, S, S) uint8; I is 0 for text alone, and counts every tile.
        context_text: The human turns, without images; in training with the spec's suffix.
        num_truncated: Tokens that the maximum length has cut off.
    """

    id: str
    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor
    context_text: str
    num_truncated: int
