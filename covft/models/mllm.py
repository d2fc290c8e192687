"""The multimodal LLM: vision tower, projector and LLM, with context for the tower.

Shape legend: B samples, T positions, I images, N visual features and M visual tokens of an image,
D vision width, H LLM width, L context tokens, C context width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covft.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID
from covft.models.eager import running_eagerly
from covft.models.llm import CausalLM
from covft.models.packed_attention import check_bounds
from covft.models.projectors import Projector
from covft.models.text_encoder import Context, FrozenTextEncoder, build_text_encoder
from covft.models.vision.auxiliary_loss import collect_losses
from covft.models.vision.feature_cache import FeatureCache
from covft.models.vision.tower import VisionTower
from covft.registry import LLMS, MODELS, PROJECTORS, VFT, check_arguments
from covft.weights import source_of


@dataclass(frozen=True)
class LossOutput:
    """The loss of a micro-batch as a sum, so that the caller normalises over the global batch.

    Attributes:
        loss_sum: Cross-entropy summed over the supervised positions, a scalar in nats.
        num_tokens: Number of supervised positions.
        auxiliary: What the VFT method adds to the loss, as a mean over the micro-batch's images
            and already weighted; None if it adds nothing.
    """

    loss_sum: Tensor
    num_tokens: int
    auxiliary: Tensor | None = None


@MODELS.register_module()
class MLLM(nn.Module):
    """A LLaVA-style model: images become tokens among the LLM's embeddings.

    Args:
        vision: ``backbone`` (an encoder's config), ``vft`` (a method's) and ``select_layer``.
        projector: A projector's config; widths and token count are derived.
        llm: An LLM's config.
        text_encoder: The context encoder's config; built only if the VFT method reads context.
        template: Conversation template, by name or config; by default the LLM's.
        dtype: Parameter type of all parts, frozen ones too, a torch name such as "bfloat16"; an
            LLM's own ``dtype`` goes before it. None leaves each part as it is built: in float32,
            unless it says otherwise. What trains in 16 bits needs an optimizer that keeps small
            updates, see :mod:`covft.engine.bf16_adamw`; pixels are normalised in float32 anyway.
    """

    def __init__(
        self,
        *,
        vision: Mapping[str, Any],
        projector: Mapping[str, Any],
        llm: Mapping[str, Any],
        text_encoder: Mapping[str, Any] | None = None,
        template: str | Mapping[str, Any] | None = None,
        dtype: str | None = None,
    ) -> None:
        super().__init__()
        parameter_type = _checked_dtype(dtype)
        if dtype is not None:
            llm = {"dtype": dtype, **llm}
        check_arguments(VisionTower, {"vft": None, **vision}, where="model.vision")
        for name in ("in_dim", "out_dim", "num_tokens"):
            if name in projector:
                raise ValueError(f"model.projector.{name} is derived by the model; remove it")
        method = VFT.build(vision.get("vft", {"type": "Freeze"}))
        if method.needs_context and text_encoder is None:
            raise ValueError(
                f"{type(method).__name__} reads the instruction; add model.text_encoder"
            )
        # The LLM comes first: its pretrained embeddings may become the context.
        language_model: CausalLM = LLMS.build(llm)
        self.text_encoder: FrozenTextEncoder | None = None
        if method.needs_context and text_encoder is not None:
            self.text_encoder = build_text_encoder(text_encoder, llm=language_model)
        context_dim = self.text_encoder.hidden_dim if self.text_encoder else None
        self.vision = VisionTower(**{**vision, "vft": method}, context_dim=context_dim)
        self.llm = language_model
        dims = {
            "in_dim": self.vision.hidden_dim,
            "out_dim": self.llm.hidden_dim,
            "num_tokens": self.vision.num_tokens,
        }
        self.projector: Projector = PROJECTORS.build({**projector, **dims})
        self.template = template or self.llm.template
        for part in (self.vision, self.projector, self.text_encoder):
            if part is not None and parameter_type is not None:
                part.to(parameter_type)

    @property
    def num_image_tokens(self) -> int:
        """Number M of tokens that stand for one image, or one tile of it, in ``input_ids``."""
        return self.projector.num_tokens

    @property
    def device(self) -> torch.device:
        """Where the LLM's parameters are."""
        return next(self.llm.parameters()).device

    def weights_sources(self) -> dict[str, str]:
        """Return where each part's pretrained weights come from."""
        parts = {"vision": self.vision.backbone, "llm": self.llm, "text_encoder": self.text_encoder}
        return {
            name: "random" if part.weights_folder is None else source_of(part.weights_folder)
            for name, part in parts.items()
            if part is not None
        }

    def train(self, mode: bool = True) -> MLLM:
        """Set training mode, but leave frozen parts in eval mode."""
        super().train(mode)
        frozen = not any(parameter.requires_grad for parameter in self.llm.parameters())
        if frozen and not self.llm.checkpointing:  # transformers recomputes in training mode only
            self.llm.eval()
        return self

    def forward(
        self,
        *,
        input_ids: Tensor,
        labels: Tensor,
        pixel_values: Tensor,
        image_to_sample: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        context_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        sample_ids: Sequence[str] = (),
    ) -> LossOutput:
        """Return the loss of a right-padded batch, or of B samples packed in one row of T tokens.

        Args:
            input_ids: Token ids with :data:`IMAGE_TOKEN_ID` at visual tokens, (B, T); packed
                (1, T).
            labels: Token ids at supervised positions, ``IGNORE_INDEX`` elsewhere, like input_ids.
            pixel_values: All images of the batch, or their tiles, uint8, (I, 3, S, S).
            image_to_sample: The sample each row of them belongs to, ascending, (I,).
            attention_mask: Padded batches only: True at real positions, (B, T).
            position_ids: Packed rows only: each token's position in its sample, (1, T); by default
                counted from 0.
            cu_seqlens: Packed rows only: where each sample begins and the last one ends, (B + 1,)
                int32.
            context_ids: Text encoder's ids of each sample's instruction, (B, L).
            context_mask: True at real context tokens, (B, L).
            sample_ids: Names of the samples, for error messages.

        Raises:
            ValueError: If images and placeholders of a sample don't agree in number, the bounds of
                a packed row aren't such, or the batch is neither or both padded and packed.
        """
        _check_form(input_ids, labels, attention_mask, position_ids, cu_seqlens)
        with collect_losses(self.vision) as auxiliary:
            embeds = self.embeddings(
                input_ids,
                pixel_values,
                image_to_sample,
                context_ids,
                context_mask,
                sample_ids,
                cu_seqlens=cu_seqlens,
            )
        states = self.llm.hidden_states(
            embeds, attention_mask, position_ids=position_ids, cu_seqlens=cu_seqlens
        )
        supervised = labels[:, 1:] != IGNORE_INDEX
        targets = labels[:, 1:][supervised]
        loss = self.llm.loss_sum(states[:, :-1][supervised], targets)
        extra = torch.stack(auxiliary).sum() if auxiliary else None
        return LossOutput(loss, len(targets), extra)

    def embeddings(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        image_to_sample: Tensor,
        context_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        sample_ids: Sequence[str] = (),
        feature_cache: FeatureCache | None = None,
        visual_tokens: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Return the LLM's inputs, text and visual tokens merged, like ``input_ids`` and (…, H).

        Arguments are those of :meth:`forward` and :meth:`generate`.
        """
        if len(pixel_values) != len(image_to_sample):
            raise ValueError(
                f"{len(pixel_values)} images, but image_to_sample names {len(image_to_sample)}"
            )
        self._check_counts(input_ids, image_to_sample, sample_ids, cu_seqlens)
        tokens = visual_tokens
        if tokens is None:
            tokens = self.visual_tokens(
                pixel_values, image_to_sample, context_ids, context_mask, feature_cache
            )
        elif feature_cache is not None or len(tokens) != len(pixel_values):
            raise ValueError(
                f"visual_tokens of {len(tokens)} images were given for {len(pixel_values)}"
                f"{'' if feature_cache is None else ', and a feature_cache that they make useless'}"
            )
        is_image = input_ids == IMAGE_TOKEN_ID
        embeds = self.llm.embed(input_ids.masked_fill(is_image, 0))
        return embeds.masked_scatter(is_image.unsqueeze(-1), tokens.to(embeds.dtype))

    def visual_tokens(
        self,
        pixel_values: Tensor,
        image_to_sample: Tensor,
        context_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        feature_cache: FeatureCache | None = None,
    ) -> Tensor:
        """Return the projected tokens of all images, (I, M, H); arguments as generate's."""
        context: Context | None = None
        # Fixed gates at inference may leave no router to read the text.
        if self.text_encoder is not None and self.vision.vft.reads_context(self.vision.backbone):
            if context_ids is None or context_mask is None:
                raise ValueError(
                    f"{type(self.vision.vft).__name__} reads the instruction, but the batch holds "
                    "no context_ids; collate it with the InputSpec of this model"
                )
            context = self.text_encoder(context_ids, context_mask).rows(image_to_sample)
        return self.projector(self.vision(pixel_values, context, cache=feature_cache))

    @torch.no_grad()
    def generate(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        image_to_sample: Tensor,
        context_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        sample_ids: Sequence[str] = (),
        feature_cache: FeatureCache | None = None,
        visual_tokens: Tensor | None = None,
        **generation: Any,
    ) -> list[list[int]]:
        """Continue right-padded prompts; tower and text encoder run once.

        Args:
            input_ids: See :meth:`forward`; likewise the arguments up to ``sample_ids``.
            attention_mask: See :meth:`forward`.
            pixel_values: See :meth:`forward`.
            image_to_sample: See :meth:`forward`.
            context_ids: See :meth:`forward`.
            context_mask: See :meth:`forward`.
            sample_ids: See :meth:`forward`.
            feature_cache: Spares encoding an image anew for each question; eval mode only.
            visual_tokens: What :meth:`visual_tokens` gave for these images, (I, M, H), instead of
                encoding them.
            generation: Passed on to transformers' ``generate`` (``streamer``, ``logits_processor``,
                …); greedy unless told otherwise.

        Returns:
            The new token ids of each prompt, the stop token and what follows it left out.
        """
        embeds = self.embeddings(
            input_ids,
            pixel_values,
            image_to_sample,
            context_ids,
            context_mask,
            sample_ids,
            feature_cache,
            visual_tokens,
        )
        # Prompts are moved to the right edge, so that all of them are continued at one position.
        order = attention_mask.long().argsort(dim=1, stable=True)
        embeds = embeds.gather(1, order.unsqueeze(-1).expand_as(embeds))
        stops = generation.pop("eos_token_id", None)
        stops = [stops] if isinstance(stops, int) else list(stops or [])
        options = {"do_sample": False, "num_beams": 1, **generation}
        with running_eagerly():
            new_ids = self.llm.model.generate(
                inputs_embeds=embeds,
                attention_mask=attention_mask.gather(1, order).long(),
                eos_token_id=stops or None,
                pad_token_id=stops[0] if stops else 0,
                **options,
            )
        return [_until_stop(row, stops) for row in new_ids.tolist()]

    def _check_counts(
        self,
        input_ids: Tensor,
        image_to_sample: Tensor,
        sample_ids: Sequence[str],
        cu_seqlens: Tensor | None,
    ) -> None:
        per_image = self.num_image_tokens
        found = _placeholders(input_ids, cu_seqlens)
        images = torch.bincount(image_to_sample, minlength=len(found))
        if len(images) > len(found):
            raise ValueError(
                f"image_to_sample names sample {len(images) - 1}, but the batch holds "
                f"{len(found)} samples"
            )
        wrong = (found != images * per_image).nonzero().flatten().tolist()
        if wrong:
            row = wrong[0]
            name = f"sample '{sample_ids[row]}'" if len(sample_ids) > row else f"sample {row}"
            raise ValueError(
                f"{name} has {int(images[row])} images but {int(found[row])} placeholders "
                f"(expected {int(images[row])} x {per_image}, a tile being an image); check that "
                "the dataset was built with this model's InputSpec"
            )


def _placeholders(input_ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return how many visual tokens each sample has a place for, (B,)."""
    is_image = input_ids == IMAGE_TOKEN_ID
    if cu_seqlens is None:
        return is_image.sum(1)
    before = F.pad(is_image[0].cumsum(0), (1, 0))
    return before[cu_seqlens[1:]] - before[cu_seqlens[:-1]]


def _check_form(
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Check that a batch is either padded or packed, and is it rightly."""
    if (attention_mask is None) == (cu_seqlens is None):
        found = "neither" if cu_seqlens is None else "both"
        raise ValueError(
            "a batch has an attention_mask (padded) or cu_seqlens (packed), this one has "
            f"{found}; collate it with Collator(spec) or Collator(spec, pack=True)"
        )
    if cu_seqlens is not None:
        check_bounds(cu_seqlens, input_ids, labels)
    elif position_ids is not None:
        raise ValueError("position_ids are a packed row's, but the batch is padded; leave them out")


def _checked_dtype(dtype: str | None) -> torch.dtype | None:
    if dtype is None:
        return None
    known = ("float32", "bfloat16", "float64")
    if dtype not in known:
        raise ValueError(f"model.dtype must be one of {', '.join(known)}, got {dtype!r}")
    return getattr(torch, dtype)


def _until_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in stops:
            return ids[:position]
    return ids
