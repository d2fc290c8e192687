"""``--to hf-llava``: a folder for transformers' LlavaForConditionalGeneration.

The encoder is a plain one: frozen, or tuned by Full, BitFit, or LoRA, which is merged.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from covft.checkpoints.export.bare_config import architecture
from covft.checkpoints.export.folder import (
    UnverifiedExportError,
    write_json,
    write_tokenizer,
    write_weights,
)
from covft.checkpoints.export.hf_vision import PublicVision, public_vision
from covft.checkpoints.export.jinja import chat_template
from covft.checkpoints.export.probe import QUESTION, Probe, compare, probe_image
from covft.checkpoints.export.source import Source, compute_dtype
from covft.conversation import IMAGE_TOKEN, IMAGE_TOKEN_ID
from covft.datasets.tiling import Tiles
from covft.models.projectors import MLPProjector

_VOCABULARY = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


def write(source: Source, folder: Path) -> None:
    """Write the run's model and its processor into a folder.

    Raises:
        ValueError: If LLaVA in transformers can't hold the model.
    """
    _check(source)
    state = source.public_state("hf-llava")
    vision = public_vision(source.model.vision.backbone)
    state.update({f"vision_tower.{name}": value for name, value in vision.rest.items()})
    tokenizer, image_id = _with_image_token(source.run.spec.tokenizer)
    for name in _VOCABULARY:
        if name in state:
            state[name] = _with_rows(state[name], image_id + 1)
    config = _config(source, vision, image_id, rows=len(state[_VOCABULARY[0]]))
    config.dtype = compute_dtype(state)
    config.architectures = ["LlavaForConditionalGeneration"]
    write_tokenizer(folder, tokenizer)
    _processor(source, tokenizer, config).save_pretrained(folder)
    config.save_pretrained(folder)
    write_json(folder / "generation_config.json", source.generation_config())
    write_weights(folder, state)


def verify(folder: Path, probe: Probe) -> float:
    """Compare the folder's processor and model with the run.

    Args:
        folder: What :func:`write` wrote.
        probe: The run's answer.

    Raises:
        UnverifiedExportError: If weights are missing, inputs differ, or logits are no numbers.
    """
    processor: Any = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(text=text, images=probe_image(), return_tensors="pt")
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise UnverifiedExportError(
                f"transformers reports {kind.replace('_', ' ')}: {sorted(info[kind])[:5]}."
            )
    image_id = model.config.image_token_id
    wanted = probe.batch["input_ids"].masked_fill(
        probe.batch["input_ids"] == IMAGE_TOKEN_ID, image_id
    )
    if not torch.equal(inputs["input_ids"], wanted):
        raise UnverifiedExportError(
            f"the exported processor gives other ids than the run: {inputs['input_ids'].tolist()} "
            f"instead of {wanted.tolist()}."
        )
    with torch.no_grad():
        found = model.eval().float()(**inputs).logits[0]
    return compare(probe.logits, found, loader="transformers.LlavaForConditionalGeneration")


def _check(source: Source) -> None:
    model = source.model
    if not (isinstance(model.projector, MLPProjector) and len(model.projector.layers) == 3):
        raise ValueError(
            "--to hf-llava: LLaVA in transformers has an MLPProjector of depth 2, the model's "
            f"{type(model.projector).__name__} is another; use --to hf, or for InternVL2's parts "
            "--to internvl2"
        )
    if isinstance(source.run.resize, Tiles):
        raise ValueError(
            "--to hf-llava: the run cuts images into tiles, which LLaVA-1.5 in transformers "
            "doesn't; use --to hf"
        )


def _config(source: Source, vision: PublicVision, image_id: int, *, rows: int) -> LlavaConfig:
    llm = source.model.llm.model.config
    has_prefix = source.model.vision.backbone.num_prefix > 0
    return LlavaConfig(
        vision_config=vision.config,
        text_config={**architecture(llm), "vocab_size": rows},
        image_token_index=image_id,
        image_seq_length=source.model.num_image_tokens,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default" if has_prefix else "full",
        vision_feature_layer=vision.layer,
        tie_word_embeddings=llm.tie_word_embeddings,
    )


def _with_image_token(
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[PreTrainedTokenizerBase, int]:
    """Return a copy that has ``<image>`` as a token, and its id."""
    tokenizer = copy.deepcopy(tokenizer)
    token = AddedToken(IMAGE_TOKEN, special=True, normalized=False)
    tokenizer.add_tokens([token], special_tokens=True)
    return tokenizer, int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def _with_rows(table: Tensor, rows: int) -> Tensor:
    """Add rows up to that number, the mean of the others: such a token is never the likeliest."""
    missing = rows - len(table)
    if missing <= 0:
        return table
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(missing, -1)])


def _processor(
    source: Source, tokenizer: PreTrainedTokenizerBase, config: LlavaConfig
) -> LlavaProcessor:
    backbone = source.model.vision.backbone
    image = backbone.image_spec
    side = {"height": image.image_size, "width": image.image_size}
    resize = source.run.resize or image.resize
    stretch = resize == "stretch"
    images = LlavaImageProcessorPil(
        do_pad=resize == "pad",
        size=side if stretch else {"shortest_edge": image.image_size},
        do_center_crop=not stretch,
        crop_size=side,
        image_mean=list(image.mean),
        image_std=list(image.std),
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=backbone.config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=backbone.num_prefix,
        chat_template=chat_template(source.run.spec.template, tokenizer),
    )
