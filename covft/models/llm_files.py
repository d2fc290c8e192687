"""Reading an LLM from a published folder, where transformers alone wouldn't.

Phi-3's first release calls its long-context rope "su": transformers 5 takes the name for
"longrope", but no longer fills in the length that goes with it, and fails. And the folder of a
whole InternVL2 holds its LLM's config as ``llm_config`` and its weights as ``language_model.*``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

#: Published models that contain an LLM, by ``model_type``: the key of its config, and its weights'
#: prefix. transformers knows none of these types, so that they can't be causal LMs themselves.
_CONTAINERS = {"internvl_chat": ("llm_config", "language_model.")}


def read_llm_config(folder: Path) -> PreTrainedConfig:
    """Return the config of the LLM in a folder: a causal LM's, or OpenGVLab's of an InternVL2.

    Raises:
        ValueError: If there is no config.json, or transformers doesn't know the LLM.
    """
    fields = _fields(folder)
    nested = _CONTAINERS.get(fields.get("model_type", ""))
    if nested is not None:
        fields = fields[nested[0]]
    scaling = fields.get("rope_scaling") or {}
    if "su" in (scaling.get("type"), scaling.get("rope_type")):
        rest = {key: value for key, value in scaling.items() if key != "type"}
        fields = {**fields, "rope_scaling": {**rest, "rope_type": "longrope"}}
    elif nested is None:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    return AutoConfig.for_model(**fields)


def load_llm(folder: Path, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """Return the LLM of a folder with its weights.

    Args:
        folder: See :func:`read_llm_config`.
        config: What that returned.
        options: Of transformers' ``from_pretrained``.

    Raises:
        ValueError: If weights are missing in the folder, or have another shape than its config
            describes.
    """
    nested = _CONTAINERS.get(_fields(folder).get("model_type", ""))
    if nested is not None:
        options["key_mapping"] = {f"^{nested[1]}": ""}
    model, info = AutoModelForCausalLM.from_pretrained(
        str(folder),
        config=config,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused below, by name
        **options,
    )
    for name, found, expected in sorted(info["mismatched_keys"], key=str):
        raise ValueError(
            f"'{folder}' has '{name}' of shape {tuple(found)}, but its config.json describes "
            f"{tuple(expected)}; correct config.json (vocab_size, hidden_size, ...) or the weights"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"'{folder}' lacks {len(missing)} weights of the {config.model_type} that its "
            f"config.json describes, the first is '{missing[0]}'; fetch the folder again"
        )
    return model


def _fields(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"'{folder}' holds no LLM: it has no config.json")
    fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return fields
