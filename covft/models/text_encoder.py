"""The frozen text encoder that turns an instruction into context for the vision encoder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from covft.models.hub_variants import HubVariant, find_origin
from covft.models.llm import CausalLM
from covft.registry import TEXT_ENCODERS
from covft.weights import resolve, resolve_tokenizer


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


class FrozenTextEncoder(nn.Module):
    """What the text encoders share: frozen, always in eval mode.

    Args:
        tokenizer: Of the texts; None in a model that is built but not fed.
        weights_folder: Where the weights were read from; None if they are random.
        max_length: Longest text in tokens; longer ones are truncated.
        training_suffix: Put after each text in training, never at inference.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase | None,
        weights_folder: Path | None,
        max_length: int,
        training_suffix: str = "",
    ) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self.training_suffix = training_suffix
        self.weights_folder = weights_folder
        self.max_length = max_length

    @property
    def hidden_dim(self) -> int:
        """Width C of the context."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the texts.

        Raises:
            ValueError: If there is none.
        """
        if self._tokenizer is None:
            raise ValueError(
                "the text encoder has no tokenizer; set model.text_encoder.tokenizer (folder or "
                "hub id), or weights that come with one"
            )
        return self._tokenizer

    def train(self, mode: bool = True) -> FrozenTextEncoder:
        """Stay in eval mode: dropout would make a frozen encoder's context random."""
        return super().train(False)


@TEXT_ENCODERS.register_module()
class TextEncoder(FrozenTextEncoder):
    """A frozen transformers encoder (BERT and its family).

    Args:
        weights: None (random), ``pretrained`` (those of the variant that ``arch`` names), or a
            folder or hub id with weights, tokenizer and config.
        arch: A name in ``variants``; or, where ``weights`` is None, a transformers config
            (``model_type`` and its fields). Left out, the weights' config.json decides.
        tokenizer: Folder or hub id of the tokenizer; by default that of ``weights``. An encoder
            without either can be built, but not be fed.
        pooling: "cls" (CoVFT's default) or "mean" over the real tokens.
        max_length: Longest text in tokens; longer ones are truncated.
        training_suffix: Put after each text in training, never at inference. CoVFT's public code
            trains with ``</s>``, which BERT reads as four tokens of ordinary text, and evaluates
            without: give it to continue a public checkpoint's training. The paper doesn't mention
            it (choice: none).

    Raises:
        ValueError: If ``weights`` and ``arch`` don't make an encoder, or an option is unknown.
    """

    #: Published encoders by the name that ``arch`` takes.
    variants: ClassVar[Mapping[str, HubVariant]] = {
        "bert-base-uncased": HubVariant(
            "google-bert/bert-base-uncased",
            {
                "model_type": "bert",
                "vocab_size": 30522,
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "max_position_embeddings": 512,
                "type_vocab_size": 2,
                "layer_norm_eps": 1e-12,
            },
        ),
        "minilm-l6": HubVariant(
            "sentence-transformers/all-MiniLM-L6-v2",
            {
                "model_type": "bert",
                "vocab_size": 30522,
                "hidden_size": 384,
                "intermediate_size": 1536,
                "num_hidden_layers": 6,
                "num_attention_heads": 12,
                "max_position_embeddings": 512,
                "type_vocab_size": 2,
                "layer_norm_eps": 1e-12,
            },
        ),
    }

    def __init__(
        self,
        *,
        weights: str | None = None,
        arch: str | Mapping[str, Any] | None = None,
        tokenizer: str | None = None,
        pooling: str = "cls",
        max_length: int = 512,
        training_suffix: str = "",
    ) -> None:
        if pooling not in ("cls", "mean"):
            raise ValueError(f"text_encoder.pooling must be 'cls' or 'mean', got {pooling!r}")
        origin = find_origin(self.variants, arch=arch, weights=weights, part="text_encoder")
        folder = None if origin.source is None else resolve(origin.source)
        if folder is not None:
            model = AutoModel.from_pretrained(str(folder), dtype=torch.float32)
            origin.check(model.config)
        else:
            model = AutoModel.from_config(AutoConfig.for_model(**dict(origin.fields or {})))
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # unused; would only take memory
        words = folder if tokenizer is None else resolve_tokenizer(tokenizer)
        super().__init__(
            tokenizer=AutoTokenizer.from_pretrained(str(words)) if words else None,
            weights_folder=folder,
            max_length=min(
                max_length, getattr(model.config, "max_position_embeddings", max_length)
            ),
            training_suffix=training_suffix,
        )
        self.model = model
        self.pooling = pooling
        self.requires_grad_(False).eval()

    @property
    def hidden_dim(self) -> int:
        """Width C of the context."""
        return self.model.config.hidden_size

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
        pooled = tokens[:, 0] if self.pooling == "cls" else _masked_mean(tokens, mask)
        return Context(pooled, tokens, mask)


@TEXT_ENCODERS.register_module()
class LLMEmbeddings(FrozenTextEncoder):
    """The LLM's own token embeddings as context: no second text encoder.

    The table is a copy of the pretrained one, so that the context stays the same while the LLM's
    embeddings train. It is frozen, so that checkpoints leave it out. The texts are tokenised as the
    LLM's tokenizer does it, a beginning-of-sequence token included where it puts one.

    Args:
        llm: The model's LLM, right after it was built; given by the model.
        pooling: "mean" over the real tokens, or "last" for the last real one.
        max_length: Longest text in tokens; longer ones are truncated.

    Raises:
        ValueError: If ``pooling`` is unknown, or the LLM's tokenizer has no token to pad with.
    """

    def __init__(self, *, llm: CausalLM, pooling: str = "mean", max_length: int = 512) -> None:
        if pooling == "cls":
            raise ValueError(
                "text_encoder.pooling='cls' is the state in which an encoder gathers the text, "
                "which token embeddings don't have; use 'mean' or 'last'"
            )
        if pooling not in ("mean", "last"):
            raise ValueError(f"text_encoder.pooling must be 'mean' or 'last', got {pooling!r}")
        super().__init__(
            tokenizer=None if llm.tokenizer is None else _padding(llm.tokenizer),
            weights_folder=llm.weights_folder,
            max_length=max_length,
        )
        table = llm.model.get_input_embeddings().weight.detach().clone()
        # A parameter, not a buffer: buffers are written to checkpoints.
        self.table = nn.Parameter(table, requires_grad=False)
        self.pooling = pooling
        self.eval()

    @property
    def hidden_dim(self) -> int:
        """Width C of the context, the LLM's."""
        return self.table.shape[1]

    @torch.no_grad()
    def forward(self, context_ids: Tensor, context_mask: Tensor) -> Context:
        """Look up and pool the embeddings of texts.

        Args:
            context_ids: Token ids of the LLM's tokenizer, (B, L).
            context_mask: True at real tokens, (B, L).
        """
        mask = context_mask.bool()
        tokens = F.embedding(context_ids.long(), self.table)
        tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        if self.pooling == "mean":
            return Context(_masked_mean(tokens, mask), tokens, mask)
        last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
        return Context(_masked_mean(tokens, last), tokens, mask)


def build_text_encoder(cfg: Mapping[str, Any], *, llm: CausalLM) -> FrozenTextEncoder:
    """Build a text encoder; one that is made of the LLM gets it.

    Args:
        cfg: The encoder's config.
        llm: The model's LLM, as it was built.

    Raises:
        ValueError: If the config gives the LLM itself, or isn't that of a text encoder.
    """
    if "llm" in cfg:
        raise ValueError("model.text_encoder.llm is given by the model; remove it")
    kind = cfg.get("type")
    if isinstance(kind, str):
        kind = TEXT_ENCODERS.get(kind)
    reads_llm = isinstance(kind, type) and issubclass(kind, LLMEmbeddings)
    given = {"llm": llm} if reads_llm else None
    encoder: FrozenTextEncoder = TEXT_ENCODERS.build(cfg, default_args=given)
    return encoder


def _masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Average the (B, L, C) tokens at which the (B, L) mask is True; zeros where it nowhere is."""
    weights = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)


def _padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer that can pad: Llama's names no token for it, and any does under a mask."""
    if tokenizer.pad_token is not None:
        return tokenizer
    token = tokenizer.eos_token or tokenizer.unk_token
    if token is None:
        raise ValueError(
            f"LLMEmbeddings pads texts, but the LLM's {type(tokenizer).__name__} names no pad, eos "
            "or unk token; set one in its tokenizer_config.json, or use a TextEncoder"
        )
    tokenizer = copy.deepcopy(tokenizer)  # the LLM's own stays as it is
    tokenizer.pad_token = token
    return tokenizer
