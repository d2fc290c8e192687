"""``--to llava``, ``covft``, ``internvl2``: files named and configured as by their authors' code.

The authors' own code reads them; here they are verified by importing them into a new model.
The public CoVFT code is LLaVA's, and its config.json has no field of the method: shapes tell it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from covft.checkpoints.export.bare_config import architecture
from covft.checkpoints.export.folder import (
    UnverifiedExportError,
    write_json,
    write_tokenizer,
    write_weights,
)
from covft.checkpoints.export.hf_vision import published_fields, published_layer
from covft.checkpoints.export.probe import Probe, compare, float32_logits
from covft.checkpoints.export.source import Source, compute_dtype
from covft.checkpoints.importing import import_checkpoint
from covft.checkpoints.run import build_model
from covft.datasets.tiling import Tiles
from covft.models.projectors import LinearProjector, PixelShuffleProjector
from covft.models.vision.clip import CLIP
from covft.vft.plain import Freeze

#: Where the code of InternVL2's folders is.
_INTERNVL_CODE = "OpenGVLab/InternVL2-4B"
_ASPECTS = {"crop": "square", "stretch": "square", "pad": "pad"}


def write_llava(source: Source, folder: Path) -> None:
    """Write LLaVA-1.5's layout.

    Raises:
        ValueError: If it can't hold the model.
    """
    _write_llava(source, folder, "llava")


def write_covft(source: Source, folder: Path) -> None:
    """Write the layout of CoVFT's public code.

    Raises:
        ValueError: If it can't hold the model.
    """
    _write_llava(source, folder, "covft")


def write_internvl2(source: Source, folder: Path) -> None:
    """Write InternVL2's layout.

    Raises:
        ValueError: If it can't hold the model.
    """
    _write(source, folder, "internvl2", _internvl2_config(source))


def verify(folder: Path, probe: Probe, *, layout: str) -> float:
    """Import the folder into a model built anew, and compare it with the run.

    Args:
        folder: What was written.
        probe: The run's answer.
        layout: The folder's.

    Raises:
        UnverifiedExportError: If a part is missing, or logits are no numbers.
    """
    stage = copy.deepcopy(probe.stage)
    stage.model.llm.pop("quantization", None)  # what was written is plain
    # Other random parts than the run's, so that nothing is right by chance.
    model = build_model(stage, seed=probe.seed + 1).eval()
    imported = import_checkpoint(model, folder, layout)
    if imported.kept:
        raise UnverifiedExportError(f"the folder lacks {', '.join(imported.kept)}.")
    return compare(probe.logits, float32_logits(model, probe.batch), loader="import_checkpoint")


def _write_llava(source: Source, folder: Path, layout: str) -> None:
    if not isinstance(source.model.vision.backbone, CLIP):
        raise ValueError(
            f"--to {layout}: LLaVA's code builds CLIP encoders alone, the model has "
            f"{type(source.model.vision.backbone).__name__}; use --to hf-llava for plain encoders, "
            "--to hf for any"
        )
    if isinstance(source.run.resize, Tiles):
        raise ValueError(f"--to {layout}: LLaVA-1.5's code cuts no images into tiles; use --to hf")
    if source.model.llm.model.config.model_type != "llama":
        raise ValueError(
            f"--to {layout}: written for LLaVA's LlavaLlamaForCausalLM, the model's LLM is a "
            f"{source.model.llm.model.config.model_type}; use --to hf-llava or --to hf"
        )
    _write(source, folder, layout, _llava_config(source))


def _write(source: Source, folder: Path, layout: str, config: dict[str, Any]) -> None:
    state = source.public_state(layout)
    write_tokenizer(folder, source.run.spec.tokenizer)
    dtype = str(compute_dtype(state)).removeprefix("torch.")
    write_json(folder / "config.json", {**config, "torch_dtype": dtype})
    write_json(folder / "generation_config.json", source.generation_config())
    write_weights(folder, state)


def _llava_config(source: Source) -> dict[str, Any]:
    model, backbone = source.model, source.model.vision.backbone
    projector: Any = model.projector
    linear = isinstance(projector, LinearProjector)
    depth = 1 if linear else (len(projector.layers) + 1) // 2
    return {
        **_llm_fields(source),
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_vision_tower": backbone.hub_id or str(backbone.weights_folder or ""),
        "mm_hidden_size": backbone.hidden_dim,
        "mm_projector_type": "linear" if linear else f"mlp{depth}x_gelu",
        "mm_vision_select_layer": published_layer(backbone),
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_patch_merge_type": "flat",
        "use_mm_proj": True,
        # LLaVA's code otherwise reads the tower from its hub id after the file, and loses its
        # tuning (`CLIPVisionTower.__init__`, `load_pretrained_model`).
        "unfreeze_mm_vision_tower": not isinstance(model.vision.vft, Freeze),
        "image_aspect_ratio": _ASPECTS[str(source.run.resize or backbone.image_spec.resize)],
    }


def _internvl2_config(source: Source) -> dict[str, Any]:
    model, backbone = source.model, source.model.vision.backbone
    projector = model.projector
    factor = projector.factor if isinstance(projector, PixelShuffleProjector) else 1
    tiles = source.run.resize if isinstance(source.run.resize, Tiles) else None
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": f"{_INTERNVL_CODE}--configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": f"{_INTERNVL_CODE}--modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": f"{_INTERNVL_CODE}--modeling_internvl_chat.InternVLChatModel",
        },
        "model_type": "internvl_chat",
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "norm_type": "layer_norm",
            "qk_normalization": False,
            "qkv_bias": backbone.config.qkv_bias,
            "drop_path_rate": backbone.config.drop_path,
            # Blocks that the model doesn't read aren't in the file.
            **published_fields(backbone, depth=backbone.select_layer),
        },
        "llm_config": _llm_fields(source),
        "downsample_ratio": 1 / factor,
        "ps_version": "v2",
        "select_layer": -1 if published_layer(backbone) == -1 else backbone.select_layer,
        "template": source.run.spec.template.name,
        "force_image_size": backbone.config.image_size,
        "dynamic_image_size": tiles is not None,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 1 if tiles is None else tiles.max_tiles,
        "use_thumbnail": tiles is not None,
        "pad2square": source.run.resize == "pad",
        "tie_word_embeddings": False,
    }


def _llm_fields(source: Source) -> dict[str, Any]:
    """Return the LLM's config, with the rope as the authors' code reads it, too.

    ``rope_parameters`` is what transformers 5 reads; code written for 4.37 takes ``rope_theta``
    and ``rope_scaling``.
    """
    fields = architecture(source.model.llm.model.config)
    rope = dict(fields.get("rope_parameters") or {})
    if "rope_theta" in rope:
        fields["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        fields["rope_scaling"] = _rope_scaling(rope, fields)
    return {**fields, "architectures": [type(source.model.llm.model).__name__]}


def _rope_scaling(rope: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``rope_scaling`` as code for transformers 4.37 wants it, which refuses further keys.

    Args:
        rope: The ``rope_parameters`` of transformers 5; not of type "default".
        fields: The whole config of the LLM.

    Returns:
        ``type`` and ``factor`` for "linear" and "dynamic"; for Phi-3's "longrope" its first
        name "su" and both lists of factors. What these can't say (other types, a factor of
        longrope's own) stays whole: newer code may read it, and older refuses it rather than
        computing something else.
    """
    kind = rope["rope_type"]
    # These say nothing that the rest of the config doesn't.
    implied = {
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": fields.get("original_max_position_embeddings"),
    }
    own = {
        key: value
        for key, value in rope.items()
        if key not in ("type", "rope_type", "rope_theta")
        and not (key in implied and implied[key] == value)
    }
    if kind in ("linear", "dynamic") and own.keys() == {"factor"}:
        # An int is refused.
        return {"type": kind, "factor": float(own["factor"])}
    is_phi3 = fields.get("model_type") == "phi3"
    if kind == "longrope" and is_phi3 and own.keys() == {"short_factor", "long_factor"}:
        return {"type": "su", **own}
    return {**{key: value for key, value in rope.items() if key != "rope_theta"}, "type": kind}
