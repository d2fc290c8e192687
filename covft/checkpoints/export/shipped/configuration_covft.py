"""The configuration of an exported model, as transformers reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig


class CoVFTConfig(PretrainedConfig):
    """What an exported model is built from.

    Args:
        model: The arguments of :class:`covft.models.MLLM`, its parts given by name and
            architecture, without any weights.
        kwargs: What every configuration of transformers takes.
    """

    model_type = "covft"

    def __init__(self, model: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self.model = dict(model or {})
        super().__init__(**kwargs)
