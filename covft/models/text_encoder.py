"""The frozen text encoder that turns an instruction into context for the vision encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from covft.registry import TEXT_ENCODERS
from covft.weights import resolve


@dataclass(frozen=True)
class Context:
    """Frozen text features, one row per text or, after :meth:`rows`, one per image.

    Attributes:
        pooled: One vector for the whole text, (I, C).
        tokens: Token states, (I, K, C).
        mask: True at real tokens, (I, K).
    """

    pooled: Tensor
    tokens: Tensor
    mask: Tensor

    def rows(self, index: Tensor) -> Context:
        """Return the context of each image, given the row (sample) that each belongs to, (I,)."""
        return Context(self.pooled[index], self.tokens[index], self.mask[index])


@TEXT_ENCODERS.register_module()
class TextEncoder(nn.Module):
    """A frozen transformers encoder (BERT and its family), always in eval mode.

    Args:
        weights: A folder or hub id with weights, tokenizer and config; or None for random weights.
        arch: Config of the encoder (``model_type`` and its fields) where ``weights`` is None.
        tokenizer: Folder or hub id of the tokenizer; by default that of ``weights``.
        pooling: "cls" (CoVFT's default) or "mean" over the real tokens.
        max_length: Longest text in tokens; longer ones are truncated.

    Raises:
        ValueError: If not one of ``weights`` and ``arch`` is given, or an option is unknown.
    """

    def __init__(
        self,
        *,
        weights: str | None = None,
        arch: Mapping[str, Any] | None = None,
        tokenizer: str | None = None,
        pooling: str = "cls",
        max_length: int = 512,
    ) -> None:
        super().__init__()
        if pooling not in ("cls", "mean"):
            raise ValueError(f"text_encoder.pooling must be 'cls' or 'mean', got {pooling!r}")
        if (weights is None) == (arch is None):
            raise ValueError("text_encoder needs either weights (folder or hub id) or arch (dict)")
        #: Where the weights were read from; None if they are random.
        self.weights_folder = None if weights is None else resolve(weights)
        if self.weights_folder is not None:
            self.model = AutoModel.from_pretrained(str(self.weights_folder), dtype=torch.float32)
        else:
            self.model = AutoModel.from_config(AutoConfig.for_model(**dict(arch or {})))
        source = tokenizer or weights
        if source is None:
            raise ValueError(
                "text_encoder with random weights needs a tokenizer (folder or hub id)"
            )
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(resolve(source))
        )
        if getattr(self.model, "pooler", None) is not None:
            self.model.pooler = None  # unused; would only take memory
        self.pooling = pooling
        positions = getattr(self.model.config, "max_position_embeddings", max_length)
        self.max_length = min(max_length, positions)
        self.requires_grad_(False).eval()

    @property
    def hidden_dim(self) -> int:
        """Width C of the context."""
        return self.model.config.hidden_size

    def train(self, mode: bool = True) -> TextEncoder:
        """Stay in eval mode: dropout would make a frozen encoder's context random."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, context_ids: Tensor, context_mask: Tensor) -> Context:
        """Encode texts.

        Args:
            context_ids: Token ids of this encoder's tokenizer, (B, L).
            context_mask: True at real tokens, (B, L).
        """
        states = self.model(input_ids=context_ids, attention_mask=context_mask.long())
        tokens = states.last_hidden_state
        mask = context_mask.bool()
        if self.pooling == "cls":
            pooled = tokens[:, 0]
        else:
            weights = mask.unsqueeze(-1).to(tokens.dtype)
            pooled = (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)
        return Context(pooled, tokens, mask)
