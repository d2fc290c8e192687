"""How many bytes training needs for certain, before the first step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from covft.engine.bf16_adamw import BF16AdamW
from covft.engine.optimizer import build_optim_wrapper
from covft.models.abstract import abstract_model
from covft.models.mllm import MLLM


def training_memory(stage: Mapping[str, Any], *, tokens: int, images: int) -> dict[str, int]:
    """Return the bytes that a stage's training takes on one device, nothing sharded.

    Left out is what comes and goes: the activations of the block that is computed just now, chunks
    of logits and of the optimizer's arithmetic, the allocator's waste and the device's context.

    Args:
        stage: A stage's config, with :class:`~covft.engine.BF16AdamW`.
        tokens: Of a micro-batch, visual ones included.
        images: Of a micro-batch, or their tiles.

    Returns:
        ``weights`` (buffers included), ``gradients``, ``low_half`` and ``moments`` of the
        optimizer, ``block_inputs`` (what blocks keep at least where all of them are recomputed;
        the encoder's in float32, in which autocast keeps them), and ``activation_budget``: the
        ``budget_gb`` of encoder and LLM, which include that.

    Raises:
        ValueError: If it is another optimizer, whose state isn't known here.
    """
    model = abstract_model(stage["model"])
    optimizer = build_optim_wrapper(model, stage["optim_wrapper"]).optimizer
    if not isinstance(optimizer, BF16AdamW):
        raise ValueError(f"the state of {type(optimizer).__name__} isn't known; use BF16AdamW")
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    state: Counter[str] = Counter()
    for parameter in trained:
        state.update(optimizer.state_bytes(parameter.numel(), parameter.dtype))
    kept = [*model.parameters(), *model.buffers()]
    return {
        "weights": sum(tensor.nbytes for tensor in kept),
        "gradients": sum(parameter.nbytes for parameter in trained),
        "low_half": state["low_half"],
        "moments": state["moments"],
        "block_inputs": _block_inputs(model, tokens=tokens, images=images),
        "activation_budget": round(_budget_gb(model) * 1e9),
    }


def _block_inputs(model: MLLM, *, tokens: int, images: int) -> int:
    backbone = model.vision.backbone
    width = torch.float32.itemsize * backbone.hidden_dim
    in_encoder = images * (backbone.num_prefix + backbone.num_tokens) * width
    with_gradient = 0
    for block in backbone.blocks:  # all after the first one with gradients have them, too
        trains = any(p.requires_grad for p in block.parameters())
        with_gradient += bool(trains or with_gradient)
    in_llm = tokens * model.llm.hidden_dim * next(model.llm.parameters()).element_size()
    return in_encoder * with_gradient + in_llm * len(model.llm.layers)


def _budget_gb(model: MLLM) -> float:
    settings = (model.vision.backbone.checkpointing, model.llm.checkpointing)
    return sum(s["budget_gb"] for s in settings if isinstance(s, Mapping))
