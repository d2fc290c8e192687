"""LLMs: thin entries over transformers' causal language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from covft.registry import LLMS
from covft.weights import resolve


@LLMS.register_module()
class CausalLM(nn.Module):
    """Any causal LM of transformers, with its tokenizer.

    Args:
        weights: A folder or hub id with weights, tokenizer and config; or None for random weights.
        arch: Config of the model (``model_type`` and its fields) where ``weights`` is None.
        tokenizer: Folder or hub id of the tokenizer; by default that of ``weights``.
        template: Name of the conversation template that goes with this model.
        freeze: Whether its parameters are left as they are (stage 1 of LLaVA).
        freeze_embeddings: Leave the token embeddings, and an output layer tied to them, alone:
            in a small model they are a large part of each optimizer step, and change little.
        dtype: Parameter type, a torch name such as "float32" or "bfloat16".
        checkpointing: Recompute each layer's activations in the backward pass.

    Raises:
        ValueError: If not exactly one of ``weights`` and ``arch`` is given, or the model
            changes its logits after the output layer.
    """

    #: Template used when a config names none.
    default_template = "chatml"

    def __init__(
        self,
        *,
        weights: str | None = None,
        arch: Mapping[str, Any] | None = None,
        tokenizer: str | None = None,
        template: str | None = None,
        freeze: bool = False,
        freeze_embeddings: bool = False,
        dtype: str = "float32",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if (weights is None) == (arch is None):
            raise ValueError("llm needs either weights (folder or hub id) or arch (dict)")
        #: Where the weights were read from; None if they are random.
        self.weights_folder = None if weights is None else resolve(weights)
        if self.weights_folder is not None:
            self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                str(self.weights_folder), dtype=getattr(torch, dtype)
            )
        else:
            config = AutoConfig.for_model(**dict(arch or {}))
            self.model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        source = tokenizer or weights
        self.tokenizer: PreTrainedTokenizerBase | None = (
            AutoTokenizer.from_pretrained(str(resolve(source))) if source else None
        )
        self.template = template or self.default_template
        # Without one of its own, generation is greedy, whatever a model's authors recommend.
        self.model.generation_config = GenerationConfig()
        _check_plain_logits(self.model.config)
        self.requires_grad_(not freeze)
        if freeze_embeddings:
            self.model.get_input_embeddings().requires_grad_(False)
        self.checkpointing = checkpointing
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def hidden_dim(self) -> int:
        """Width H of the embeddings."""
        return self.model.get_input_embeddings().weight.shape[1]

    def embed(self, input_ids: Tensor) -> Tensor:
        """Look up token embeddings, (B, T) to (B, T, H)."""
        return self.model.get_input_embeddings()(input_ids)

    def hidden_states(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the last layer's normalised states, (B, T, H)."""
        decoder = self.model.get_decoder()
        output = decoder(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False
        )
        return output.last_hidden_state

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Return vocabulary logits of any leading shape, (…, H) to (…, V)."""
        return self.model.get_output_embeddings()(hidden_states)


@LLMS.register_module()
class Vicuna(CausalLM):
    """Vicuna-1.5 (Llama-2), with LLaVA's "v1" template."""

    default_template = "v1"


@LLMS.register_module()
class Phi3(CausalLM):
    """Phi-3, with InternVL2's "phi3-chat" template."""

    default_template = "phi3-chat"


def _check_plain_logits(config: Any) -> None:
    """Refuse models whose forward changes the logits: the loss is taken from the output layer."""
    neutral = {"logits_scaling": 1, "logit_scale": 1, "final_logit_softcapping": None}
    for name, value in neutral.items():
        if getattr(config, name, value) != value:
            raise ValueError(
                f"{config.model_type} changes its logits ({name}={getattr(config, name)}), which "
                "the loss wouldn't; use an LLM without such a setting"
            )
