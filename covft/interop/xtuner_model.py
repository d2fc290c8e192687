"""The ``model`` of an xtuner 0.2 config, and the tokens and templates that its data need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from covft.interop.references import Reference
from covft.interop.section import Section, shown
from covft.models import (
    CLIP,
    MLLM,
    CausalLM,
    InternViT,
    MLPProjector,
    Phi3,
    PixelShuffleProjector,
    SigLIP,
    Vicuna,
)
from covft.models.vision.backbone import VisionBackbone
from covft.registry import TEMPLATES, nearest
from covft.vft import Freeze, Full, LoRA

#: xtuner's PROMPT_TEMPLATE -> ours, and in what the two differ.
PROMPTS: dict[str, tuple[str | dict[str, str], str]] = {
    "vicuna": (
        "v1",
        "'v1' (LLaVA-1.5) begins with Vicuna's system prompt, which xtuner leaves out, and has no "
        "line break and no further <s> between turns",
    ),
    "internlm2_chat": (
        {"type": "chatml", "system": ""},
        "the image moves in front of its question",
    ),
    "qwen_chat": ({"type": "chatml", "system": ""}, "the image moves in front of its question"),
    "phi3_chat": (
        "phi3-chat",
        "'phi3-chat' has no line break after <|end|>; InternVL2's has a system prompt, and <img> "
        "and </img> around images",
    ),
}
_BARE_PHI3 = {"type": "phi3-chat", "system": "", "image_marks": False}
_ENCODERS = {
    "CLIPVisionModel.from_pretrained": CLIP,
    "SiglipVisionModel.from_pretrained": SigLIP,
}
_LLMS = (Vicuna, Phi3, CausalLM)
_TORCH_DTYPES = ("float32", "bfloat16", "float16")
#: Tiles of an image at most, where InternVL2's config.json decides (max_dynamic_patch).
INTERNVL_TILES = 12


def convert_model(model: Section, template: str | dict[str, str]) -> tuple[dict[str, Any], Any]:
    """Convert ``model``.

    Args:
        model: xtuner's.
        template: The conversation template.

    Returns:
        Ours, and what it is to start from: the value of ``load_from``, or None.

    Raises:
        ValueError: If the model can't be expressed here.
    """
    convert = model.kind({"LLaVAModel": _llava, "InternVL_V1_5": _internvl})
    converted = convert(model, template)
    load_from = model.take("pretrained_pth", None) or converted.pop("load_from", None)
    # xtuner gives these to its own evaluation alone.
    model.expect(tokenizer=None, image_processor=None, template=None)
    model.finish()
    return converted, load_from


def prompt_template(name: Any, override: str | None, where: str, notes: list[str]) -> Any:
    """Return our template for xtuner's, or ``override``.

    Raises:
        ValueError: If there is none, or the override isn't registered.
    """
    if override is not None:
        if override not in TEMPLATES.names():
            raise ValueError(f"template '{override}': {nearest(override, TEMPLATES.names())}")
        notes.append(f"{where} = {shown(name)}: replaced by '{override}', as asked for")
        return override
    short = name.name.rpartition(".")[2] if isinstance(name, Reference) else name
    if short not in PROMPTS:
        raise ValueError(
            f"{where} = {shown(name)} has no counterpart here (known: {', '.join(PROMPTS)}); "
            f"name one of this project's templates ({', '.join(TEMPLATES.names())}) by --template"
        )
    template, difference = PROMPTS[short]
    notes.append(f"{where} = {shown(name)}: {difference}")
    return template


def image_tokens(model: Mapping[str, Any]) -> int | None:
    """Return how many tokens an image (or tile) of a converted model takes, if its name says."""
    backbone = model["vision"]["backbone"]
    variant = backbone["type"].variants.get(backbone.get("arch"))
    if variant is None:
        return None
    return variant.config.grid**2 // (
        4 if model["projector"]["type"] is PixelShuffleProjector else 1
    )


def _llava(model: Section, template: Any) -> dict[str, Any]:
    recompute = model.take("use_activation_checkpointing", True)
    for key, value in (("max_position_embeddings", None), ("token_merge_ratio", 1)):
        found = model.take(key, value)
        if found != value:
            raise ValueError(f"{model.where(key)} = {found} has no counterpart here; remove it")
    llm = _llm(_needed(model, "llm"))
    llm |= _llm_training(model, frozen=model.take("freeze_llm", False))
    vision = _encoder(_needed(model, "visual_encoder"))
    layer = model.take("visual_select_layer", -2)
    if recompute:
        llm["checkpointing"] = vision["checkpointing"] = True
    converted: dict[str, Any] = {
        "type": MLLM,
        "vision": {"backbone": vision, "vft": _vision_training(model)},
        "projector": {"type": MLPProjector, "depth": model.take("projector_depth", 2)},
        "llm": llm,
        # InternVL2's marks aren't in Phi-3's own tokenizer.
        "template": _BARE_PHI3 if template == "phi3-chat" else template,
    }
    if layer != vision["type"].default_select_layer:
        converted["vision"]["select_layer"] = layer
    return converted


def _internvl(model: Section, template: Any) -> dict[str, Any]:
    path = model.take("model_path")
    if template != "phi3-chat":
        raise ValueError(
            f"{model.where('model_path')} = '{path}': of the InternVL2 models, only 4B's LLM "
            "(Phi-3, template phi3_chat) is known here"
        )
    vision = {"type": InternViT, "arch": "300m-448", "weights": path, "checkpointing": True}
    llm: dict[str, Any] = {"type": Phi3, "weights": path, "checkpointing": True}
    if model.take("quantization_llm", False):
        llm |= {"quantization": "nf4", "dtype": "bfloat16"}
    llm |= _llm_training(model, frozen=model.take("freeze_llm", False))
    if model.take("quantization_vit", False):
        model.note("quantization_vit", True, "the encoder stays in 32 bits")
    model.notes.append(
        f"{model.where('model_path')} = '{path}': encoder and LLM are read from it; the projector "
        "is, too, through load_from, which must be a folder on disk"
    )
    return {
        "type": MLLM,
        "vision": {"backbone": vision, "vft": _vision_training(model)},
        "projector": {"type": PixelShuffleProjector},
        "llm": llm,
        "template": template,
        "load_from": path,
    }


def _needed(model: Section, key: str) -> Section:
    section = model.section(key)
    if section is None:
        raise ValueError(f"{model.where(key)} is missing")
    return section


def _llm(llm: Section) -> dict[str, Any]:
    kind = llm.kind({"AutoModelForCausalLM.from_pretrained": CausalLM})
    name = llm.take("pretrained_model_name_or_path")
    converted: dict[str, Any] = {"type": kind, "weights": name}
    for known in _LLMS:
        for arch, variant in known.variants.items():
            if variant.hub_id == name:
                converted = {"type": known, "arch": arch, "weights": "pretrained"}
    if llm.take("trust_remote_code", False) and "arch" not in converted:
        llm.note(
            "trust_remote_code", True, f"no code of '{name}' is run: transformers must know it"
        )
    dtype = llm.take("torch_dtype", None)
    if dtype is not None:
        dtype = str(dtype).rpartition(".")[2]
        if dtype not in _TORCH_DTYPES:
            raise ValueError(f"{llm.where('torch_dtype')} = {dtype} isn't known here")
        if dtype == "float16":
            llm.note("torch_dtype", dtype, "bfloat16 instead, which needs no loss scaling")
            dtype = "bfloat16"
        converted["dtype"] = dtype
    quantization = llm.section("quantization_config")
    if quantization is not None:
        converted["quantization"] = _nf4(quantization)
    llm.finish()
    return converted


def _nf4(quantization: Section) -> str:
    quantization.kind({"BitsAndBytesConfig": None})
    for key, expected in (("load_in_4bit", True), ("bnb_4bit_quant_type", "nf4")):
        found = quantization.take(key, None)
        if found != expected:
            raise ValueError(
                f"{quantization.where(key)} = {shown(found)}: only {expected!r} has a counterpart "
                "(llm.quantization='nf4')"
            )
    if not quantization.take("bnb_4bit_use_double_quant", False):
        quantization.note("bnb_4bit_use_double_quant", False, "always on here")
    compute = quantization.take("bnb_4bit_compute_dtype", None)
    if compute != Reference("torch.bfloat16"):
        quantization.note("bnb_4bit_compute_dtype", compute, "always bfloat16 here")
    # Of 8-bit weights alone.
    quantization.expect(load_in_8bit=False, llm_int8_threshold=6.0, llm_int8_has_fp16_weight=False)
    quantization.finish()
    return "nf4"


def _llm_training(model: Section, *, frozen: bool) -> dict[str, Any]:
    lora = model.section("llm_lora")
    if lora is None:
        return {"freeze": True} if frozen else {}
    return {"lora": _lora(lora)}


def _lora(lora: Section) -> dict[str, Any]:
    lora.kind({"LoraConfig": None})
    # peft's defaults.
    converted = {
        "rank": lora.take("r", 8),
        "alpha": float(lora.take("lora_alpha", 8)),
        "dropout": lora.take("lora_dropout", 0.0),
    }
    targets = lora.take("target_modules", None)
    if targets is not None:
        converted["target"] = [str(target) for target in targets]
    bias = lora.take("bias", "none")
    if bias != "none":
        raise ValueError(f"{lora.where('bias')} = '{bias}' has no counterpart here; only 'none'")
    lora.take("task_type", None)
    lora.finish()
    return converted


def _encoder(encoder: Section) -> dict[str, Any]:
    kind: type[VisionBackbone] = encoder.kind(_ENCODERS)
    name = encoder.take("pretrained_model_name_or_path")
    if kind is SigLIP:
        encoder.note(
            "type", "SiglipVisionModel", "all patches are kept; xtuner 0.2.0 drops the first one"
        )
    converted: dict[str, Any] = {"type": kind, "weights": name}
    for arch, variant in kind.variants.items():
        if variant.hub_id == name:
            converted = {"type": kind, "arch": arch, "weights": "pretrained"}
    encoder.finish()
    return converted


def _vision_training(model: Section) -> dict[str, Any]:
    frozen = model.take("freeze_visual_encoder", False)
    lora = model.section("visual_encoder_lora")
    if lora is None:
        return {"type": Freeze if frozen else Full}
    options = _lora(lora)
    targets = options.pop("target", None)
    lora.note(
        "target_modules",
        targets,
        "the four attention projections of each block are adapted, not the MLPs",
    )
    return {"type": LoRA, **options}
