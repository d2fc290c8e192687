"""Models without weights: shapes and counts of what a config describes, however large it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from covft.models.mllm import MLLM
from covft.registry import LLMS, MODELS, TEXT_ENCODERS, VISION_BACKBONES, Registry


class UnknownArchitectureError(ValueError):
    """Only the files of a model's weights know its architecture."""


def abstract_model(model_cfg: Mapping[str, Any]) -> MLLM:
    """Build a model on the meta device: every parameter's shape, and none of its values.

    Args:
        model_cfg: The ``model`` of a config; it isn't changed. Nothing is read or downloaded, so
            its parts must name an architecture, or be published ones that the code knows. A
            quantised LLM is built as it is before it is quantised.

    Raises:
        UnknownArchitectureError: If only files know a part's architecture.
        ValueError: If the config doesn't make a model.
    """
    cfg = without_files(model_cfg)
    # Packed weights would hide the shapes, and need a package of their own.
    cfg["llm"].pop("quantization", None)
    with torch.device("meta"):
        model: MLLM = MODELS.build(cfg)
    return model


def without_files(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``model`` of a config that builds the same architecture with random weights.

    Nothing is read or downloaded then; without its tokenizers the model can't be fed with text.

    Raises:
        UnknownArchitectureError: If only files know a part's architecture.
    """
    cfg = dict(model_cfg)
    cfg["llm"] = _without_files(cfg["llm"], LLMS)
    cfg["vision"] = dict(cfg["vision"])
    cfg["vision"]["backbone"] = _without_files(cfg["vision"]["backbone"], VISION_BACKBONES)
    if cfg.get("text_encoder"):
        cfg["text_encoder"] = _without_files(cfg["text_encoder"], TEXT_ENCODERS)
    return cfg


def parameter_counts(model: MLLM) -> dict[str, int]:
    """Count parameters, those of the vision encoder with what its tuning has put into it.

    Returns:
        ``vision`` and ``vision_trainable`` of the tower (encoder and connector), ``trainable`` and
        ``total`` of the whole model, a text encoder included. Buffers aren't counted.
    """
    return {
        "vision": _count(model.vision),
        "vision_trainable": _count(model.vision, trainable=True),
        "trainable": _count(model, trainable=True),
        "total": _count(model),
    }


def _without_files(cfg: Mapping[str, Any], registry: Registry) -> dict[str, Any]:
    """Return a part's config without weights and tokenizer, its architecture named."""
    part = {key: value for key, value in cfg.items() if key not in ("weights", "tokenizer")}
    weights = cfg.get("weights")
    if part.get("arch") is None and weights not in (None, "pretrained"):
        kind = part["type"]
        kind = registry.get(kind) if isinstance(kind, str) else kind
        variants = getattr(kind, "variants", {})
        names = [name for name, variant in variants.items() if variant.hub_id == weights]
        if not names:
            raise UnknownArchitectureError(
                f"the architecture of the {registry.name} '{weights}' is known to its files alone; "
                f"name it in arch ({', '.join(variants)}) to build it without them"
            )
        part["arch"] = names[0]
    return part


def _count(module: nn.Module, *, trainable: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)
