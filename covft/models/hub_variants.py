"""Published transformers models by name: where their weights are, and their architecture.

A part of the MLLM that transformers implements is chosen by ``arch`` and ``weights``, as the vision
encoders are: a name stands for a published model, so that it can be built without its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from covft.registry import nearest

#: Fields that the shapes of the weights follow from.
_SHAPING = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


@dataclass(frozen=True)
class HubVariant:
    """A published model.

    Attributes:
        hub_id: Where its weights, tokenizer and config are.
        fields: Its transformers config: ``model_type`` and fields.
    """

    hub_id: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Origin:
    """Where a model comes from.

    Attributes:
        source: Folder or hub id of the weights; None builds random ones.
        fields: Transformers config to build, or that the weights' config has to agree with.
    """

    source: str | None
    fields: Mapping[str, Any] | None

    def check(self, config: Any) -> None:
        """Compare the config that came with the weights to the architecture that was asked for.

        What doesn't shape the weights, such as the longest context, may differ.

        Raises:
            ValueError: If a field differs.
        """
        differing = [
            f"{name}: arch {value!r}, config.json {getattr(config, name, None)!r}"
            for name, value in (self.fields or {}).items()
            if name in _SHAPING and getattr(config, name, None) != value
        ]
        if differing:
            raise ValueError(
                f"arch and the config.json of '{self.source}' differ ({'; '.join(differing)}); "
                "leave out arch to take the weights' architecture"
            )


def find_origin(
    variants: Mapping[str, HubVariant],
    *,
    arch: str | Mapping[str, Any] | None,
    weights: str | None,
    part: str,
) -> Origin:
    """Return what ``arch`` and ``weights`` of a config mean together.

    Args:
        variants: The published models that ``arch`` may name.
        arch: A name, or a dict of ``model_type`` and fields; None leaves it to the weights.
        weights: None (random), ``pretrained`` (the named variant's), a folder, or a hub id.
        part: The config key of the part, for errors.

    Raises:
        ValueError: If the name is unknown, or the two don't make a model.
    """
    if isinstance(arch, str):
        if arch not in variants:
            raise ValueError(f"{part}.arch '{arch}' is unknown; {nearest(arch, variants)}")
        if weights == "pretrained":
            return Origin(variants[arch].hub_id, None)
        return Origin(weights, variants[arch].fields)
    if weights == "pretrained":
        raise ValueError(
            f"{part}.weights='pretrained' needs a named arch ({', '.join(variants)}); otherwise "
            "set weights to a folder or hub id, or to None for random ones"
        )
    if (weights is None) == (arch is None):
        raise ValueError(
            f"{part} needs either weights (folder or hub id) or arch (dict), or a named arch "
            f"({', '.join(variants)}) with any weights"
        )
    return Origin(weights, arch)
