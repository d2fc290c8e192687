"""What a checkpoint's config.json says beyond the shapes of its weights.

A wrong number of heads, layer or rotary base loads without a complaint, and answers nonsense.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from covft.models.mllm import MLLM
from covft.models.vision.pretrained import read_config

#: The hidden state that the encoder's output is: LLaVA's, transformers' and InternVL2's key.
_SELECT_KEYS = ("mm_vision_select_layer", "vision_feature_layer", "select_layer")
_LLM_KEYS = ("text_config", "llm_config")
#: Fields of an LLM that its weights' shapes don't show.
_LLM_FIELDS = ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "hidden_act")


def check_published_config(model: MLLM, path: str | Path) -> None:
    """Compare a config.json beside the weights with the model, where it says something.

    Raises:
        ValueError: If the layer that is read, the encoder or the LLM is another one.
    """
    folder = Path(path).expanduser()
    config = read_config(folder if folder.is_dir() else folder.parent)
    if config is None:
        return
    differing = [
        *_layer(config, model),
        *_encoder(config, model),
        *_llm(config, model),
    ]
    if differing:
        raise ValueError(
            "config.json and the model differ: " + "; ".join(differing) + ". Change the config's "
            "model to the file's"
        )


def _layer(config: Mapping[str, Any], model: MLLM) -> Iterator[str]:
    backbone = model.vision.backbone
    for key in _SELECT_KEYS:
        layer = config.get(key)
        if not isinstance(layer, int):
            continue
        layer = layer if layer >= 0 else backbone.config.depth + 1 + layer
        if layer != backbone.select_layer:
            yield (
                f"{key}={config[key]} reads the output of block {layer}, the model that of block "
                f"{backbone.select_layer} (model.vision.select_layer)"
            )


def _encoder(config: Mapping[str, Any], model: MLLM) -> Iterator[str]:
    backbone = model.vision.backbone
    if "vision_config" not in config:
        return
    published = type(backbone).fields_from_config(config)
    for name, value in published.items():
        own = getattr(backbone.config, name)
        if own != value and name not in ("image_size", "depth"):
            yield f"the encoder's {name} is {value!r}, the model's {own!r}"


def _llm(config: Mapping[str, Any], model: MLLM) -> Iterator[str]:
    published = next((config[key] for key in _LLM_KEYS if key in config), None)
    if published is None:
        # LLaVA's own files have the LLM's fields beside their own.
        published = config if "mm_vision_tower" in config else {}
    own = model.llm.model.config
    for name in _LLM_FIELDS:
        value = published.get(name)
        if value is not None and value != getattr(own, name, value):
            yield f"the LLM's {name} is {value!r}, the model's {getattr(own, name)!r}"
    base, own_base = _rope_theta(published), _rope_theta(own.to_dict())
    if base is not None and own_base is not None and base != own_base:
        yield f"the LLM's rope_theta is {base:g}, the model's {own_base:g}"
    # Files of other layouts leave the LLM's fields out; then nothing is known of its rope.
    if published.get("hidden_size") is not None:
        scaling, own_scaling = _rope_scaling(published), _rope_scaling(own.to_dict())
        if scaling != own_scaling:
            yield (
                f"the LLM's rope scaling is {scaling}, the model's {own_scaling} (set "
                "model.llm.weights to the folder, whose config then decides)"
            )


def _rope_theta(config: Mapping[str, Any]) -> float | None:
    inner = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return config.get("rope_theta", inner.get("rope_theta"))


def _rope_scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config says of stretched positions, in one form; empty for plain ones."""
    inner = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = inner.get("rope_type", inner.get("type", "default"))
    if kind == "default":
        return {}
    known = ("factor", "short_factor", "long_factor")
    values = {key: inner[key] for key in known if inner.get(key) is not None}
    return {"type": "longrope" if kind == "su" else kind, **values}
