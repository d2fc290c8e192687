"""Batches for generation: questions about images, without answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from covft.conversation import IGNORE_INDEX, Turn, context_text, encode_prompt
from covft.datasets.collate import Collator
from covft.datasets.sample import Sample
from covft.datasets.spec import InputSpec
from covft.datasets.streaming import answer_text
from covft.datasets.tiling import Resizing, squares, stacked
from covft.models.mllm import MLLM
from covft.models.vision.feature_cache import FeatureCache


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        id: Names it in errors and results.
        turns: The conversation, the last turn a question.
        images: Its images, in the order of their tags.
        context: Text that context-aware methods read; by default the human turns.
    """

    id: str
    turns: Sequence[Turn]
    images: Sequence[Image.Image] = ()
    context: str | None = None


def collate_prompts(
    prompts: Sequence[Prompt], spec: InputSpec, *, resize: Resizing = None
) -> dict[str, Any]:
    """Return the arguments of :meth:`covft.models.MLLM.generate` for prompts.

    Args:
        prompts: What to ask.
        spec: The model's side.
        resize: How images become squares, a run's ``resize``; None is the encoder's own way.
    """
    return collate_samples([_sample(prompt, spec, resize) for prompt in prompts], spec)


def collate_samples(samples: Sequence[Sample], spec: InputSpec) -> dict[str, Any]:
    """Return what :func:`collate_prompts` does, for samples of :func:`prompt_sample`."""
    batch = Collator(spec)(samples)
    return {key: value for key, value in batch.items() if key not in ("labels", "bad_samples")}


def prompt_batch(
    prompts: Sequence[Prompt],
    spec: InputSpec,
    *,
    device: torch.device | str,
    resize: Resizing = None,
) -> dict[str, Any]:
    """Return what :func:`collate_prompts` does, on a device."""
    return _on_device(collate_prompts(prompts, spec, resize=resize), device)


def generate_answers(
    model: MLLM,
    prompts: Sequence[Prompt],
    spec: InputSpec,
    *,
    max_new_tokens: int,
    resize: Resizing = None,
    feature_cache: FeatureCache | None = None,
) -> list[str]:
    """Return a model's answers to prompts, generated greedily in one batch.

    Args:
        model: The model, in eval mode.
        prompts: What to ask; at least one.
        spec: The model's side.
        max_new_tokens: Longest answer in tokens.
        resize: How images become squares, a run's ``resize``; None is the encoder's own way.
        feature_cache: Kept by the caller where several batches ask about the same images.
    """
    batch = collate_prompts(prompts, spec, resize=resize)
    new_ids = generate_tokens(
        model, batch, spec, max_new_tokens=max_new_tokens, feature_cache=feature_cache
    )
    return [answer_text(ids, spec.tokenizer) for ids in new_ids]


def generate_tokens(
    model: MLLM,
    batch: Mapping[str, Any],
    spec: InputSpec,
    *,
    max_new_tokens: int,
    feature_cache: FeatureCache | None = None,
) -> list[list[int]]:
    """Return the token ids of a model's answers to a batch of :func:`collate_samples`, greedily."""
    return model.generate(
        **_on_device(batch, model.device),
        feature_cache=feature_cache,
        max_new_tokens=max_new_tokens,
        eos_token_id=spec.template.stop_token_ids(spec.tokenizer),
    )


def blank_like(image: Image.Image) -> Image.Image:
    """Return a mid-grey image of the same size: what a model sees that must answer blindly."""
    return Image.new("RGB", image.size, (128, 128, 128))


def prompt_sample(prompt: Prompt, pixels: Sequence[Tensor], spec: InputSpec) -> Sample:
    """Return a prompt as the collator takes it.

    Args:
        prompt: What to ask; its ``images`` aren't looked at.
        pixels: The images as squares, of :func:`covft.datasets.tiling.squares`.
        spec: The model's side.
    """
    input_ids = encode_prompt(
        prompt.turns,
        template=spec.template,
        tokenizer=spec.tokenizer,
        num_image_tokens=[spec.num_image_tokens * len(image) for image in pixels],
        sample_id=prompt.id,
    )
    return Sample(
        id=prompt.id,
        input_ids=input_ids,
        labels=torch.full_like(input_ids, IGNORE_INDEX),
        pixel_values=stacked(pixels, spec.image),
        context_text=context_text(prompt.turns) if prompt.context is None else prompt.context,
        num_truncated=0,
    )


def _sample(prompt: Prompt, spec: InputSpec, resize: Resizing) -> Sample:
    return prompt_sample(prompt, squares(prompt.images, spec.image, resize=resize), spec)


def _on_device(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
