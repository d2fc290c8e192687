"""The config of a model that gets all of its weights from one folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from covft.models.mllm import MLLM
from covft.models.text_encoder import LLMEmbeddings
from covft.models.vision.backbone import VisionBackbone
from covft.registry import LLMS, PROJECTORS, TEXT_ENCODERS, VFT, VISION_BACKBONES, Registry

#: Fields of a transformers config that say how it was written, not what the model is.
_WRITTEN = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


def bare_config(model: MLLM, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of :class:`MLLM` that build ``model`` again, without reading any weights.

    Args:
        model: The model.
        cfg: The ``model`` of the config that it was built from.

    Returns:
        Plain values, that JSON can hold.

    Raises:
        ValueError: If an option isn't such a value.
    """
    vision = {
        "backbone": _backbone(model.vision.backbone),
        "vft": _part(model.vision.vft, VFT, cfg["vision"].get("vft") or {}),
    }
    bare: dict[str, Any] = {
        "vision": vision,
        "projector": _part(model.projector, PROJECTORS, cfg["projector"]),
        "llm": {
            "type": _registered_name(model.llm, LLMS),
            "arch": architecture(model.llm.model.config),
        },
    }
    encoder: Any = model.text_encoder
    if encoder is not None:
        options = _part(encoder, TEXT_ENCODERS, cfg["text_encoder"])
        for name in ("weights", "arch", "tokenizer"):
            options.pop(name, None)
        if not isinstance(encoder, LLMEmbeddings):
            options["arch"] = architecture(encoder.model.config)
        bare["text_encoder"] = {**options, "max_length": encoder.max_length}
    try:
        plain: dict[str, Any] = json.loads(json.dumps(bare))
    except TypeError as error:
        raise ValueError(
            f"the model's config holds a value that a JSON file can't ({error}); use plain values"
        ) from error
    return plain


def part_modules(model: MLLM) -> list[str]:
    """Return the modules that define a model's parts."""
    parts = (
        model.vision.backbone,
        model.vision.vft,
        model.projector,
        model.llm,
        model.text_encoder,
    )
    return list(dict.fromkeys(type(part).__module__ for part in parts if part is not None))


def architecture(config: Any) -> dict[str, Any]:
    """Return a transformers config as the fields that build it, ``model_type`` included."""
    return {key: value for key, value in config.to_dict().items() if key not in _WRITTEN}


def _backbone(backbone: VisionBackbone) -> dict[str, Any]:
    config = backbone.config
    bare: dict[str, Any] = {"type": _registered_name(backbone, VISION_BACKBONES)}
    for name, variant in backbone.variants.items():
        size = config.image_size
        if replace(variant.config, image_size=size, drop_path=config.drop_path) == config:
            bare["arch"] = name
            if variant.config.image_size != size:
                bare["image_size"] = size
            break
    else:
        bare["arch"] = asdict(config)
    final_norm = isinstance(backbone.final_norm, nn.LayerNorm)
    return {**bare, "select_layer": backbone.select_layer, "final_norm": final_norm}


def _part(part: Any, registry: Registry, cfg: Mapping[str, Any]) -> dict[str, Any]:
    options = {key: value for key, value in cfg.items() if key != "type"}
    return {"type": _registered_name(part, registry), **options}


def _registered_name(part: Any, registry: Registry) -> str:
    names = [name for name, kind in registry.module_dict.items() if kind is type(part)]
    if not names:
        raise ValueError(
            f"{type(part).__name__} isn't registered as a {registry.name}, so an exported model "
            "can't name it; register its class"
        )
    return names[0]
