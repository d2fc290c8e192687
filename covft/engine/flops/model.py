"""The operations of a training step or an answer, from the model and the lengths of its inputs.

Conventions: real tokens alone, no padding; no recomputation; a causal attention is half of the
square; a gradient that nobody needs (of frozen weights, and of everything before the first
trainable part) isn't computed; the output layer is computed at supervised positions alone, in
generation at one position a token; the text encoder runs forward once a text.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from covft.conversation import IGNORE_INDEX
from covft.engine.flops.language import llm_flops, text_encoder_flops
from covft.engine.flops.tally import Flops
from covft.engine.flops.vision import projector_flops, tower_flops
from covft.models.mllm import MLLM


@dataclass(frozen=True)
class Work:
    """What a micro-batch's operations depend on.

    Attributes:
        lengths: Tokens of each sample in the LLM, visual ones included, padding not.
        supervised: Positions with a label.
        image_texts: For each image (or tile), the context tokens of its instruction; 0 where the
            model has no text encoder.
        texts: Context tokens of each sample.
    """

    lengths: Sequence[int]
    supervised: int
    image_texts: Sequence[int] = ()
    texts: Sequence[int] = ()

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Work:
        """Return the work of a micro-batch, padded or packed, as the collator makes it."""
        if "cu_seqlens" in batch:
            lengths = batch["cu_seqlens"].diff().tolist()
        else:
            lengths = batch["attention_mask"].sum(1).tolist()
        image_texts: list[int] = []
        texts: list[int] = []
        if "context_mask" in batch:
            texts = batch["context_mask"].sum(1).tolist()
        if "image_to_sample" in batch:
            owners = batch["image_to_sample"].tolist()
            image_texts = [texts[owner] if texts else 0 for owner in owners]
        supervised = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        return cls(tuple(lengths), supervised, tuple(image_texts), tuple(texts))


class FlopModel:
    """Counts a model's operations; made anew when what trains, or the routing, has changed.

    Args:
        model: The model, in the mode (training or evaluation) it is counted in, on any device.

    Raises:
        ValueError: If a part of the model has no counter.
    """

    def __init__(self, model: MLLM) -> None:
        if not isinstance(model, MLLM):
            raise ValueError(f"operations are counted of an MLLM, not of a {type(model).__name__}")
        reads = model.vision.vft.reads_context(model.vision.backbone)
        self._text_encoder = model.text_encoder if reads else None
        self._tower = functools.cache(
            lambda text_tokens: tower_flops(model.vision, text_tokens=text_tokens)
        )
        self._text = functools.cache(self._text_flops)
        tower = self._tower(0)
        self._depends_on_text = tower.depends_on_text
        self._projector, needs_grad = projector_flops(
            model.projector, features_need_grad=tower.features_need_grad
        )
        self._llm = llm_flops(model.llm, inputs_need_grad=needs_grad)
        self._text(1)  # so that a text encoder that isn't known is refused now

    def parts(self, work: Work) -> dict[str, Flops]:
        """Return the operations of a micro-batch by part.

        Returns:
            ``vision``, ``projector``, ``llm`` (without its output layer), ``lm_head`` and
            ``text_encoder``.
        """
        vision, text, llm = Flops(), Flops(), Flops()
        for tokens in work.image_texts:
            vision += self._tower(tokens if self._depends_on_text else 0).flops
        for tokens in work.texts:
            text += self._text(tokens)
        for length in work.lengths:
            llm += self._llm.states(length)
        return {
            "vision": vision,
            "projector": self._projector * len(work.image_texts),
            "llm": llm,
            "lm_head": self._llm.per_logit_row * work.supervised,
            "text_encoder": text,
        }

    def of(self, work: Work) -> Flops:
        """Return the operations of a micro-batch, forward and backward."""
        return sum(self.parts(work).values(), Flops())

    def generation(self, work: Work, *, new_tokens: int) -> float:
        """Return the operations of answering prompts, each by ``new_tokens`` tokens.

        Args:
            work: The prompts; ``supervised`` isn't read.
            new_tokens: Tokens of each answer; at least one, which the prompt's pass gives.
        """
        prompt = Work(work.lengths, len(work.lengths), work.image_texts, work.texts)
        flops = self.of(prompt).forward
        for length in work.lengths:
            added = new_tokens - 1
            flops += self._llm.states(length + added, new=added).forward
            flops += (self._llm.per_logit_row * added).forward
        return flops

    def _text_flops(self, length: int) -> Flops:
        if self._text_encoder is None:
            return Flops()
        return text_encoder_flops(self._text_encoder, length)
