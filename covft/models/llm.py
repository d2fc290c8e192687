"""LLMs: thin entries over transformers' causal language models."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

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
from transformers.modeling_layers import GradientCheckpointingLayer

from covft.models.checkpointing import CheckpointingPolicy, Setting
from covft.models.hub_variants import HubVariant, find_origin
from covft.models.llm_adapters import (
    adapt_linears,
    checked_options,
    merged_state_dict,
    quantize_linears,
)
from covft.models.llm_files import load_llm, read_llm_config
from covft.models.lm_loss import as_output_layer, supervised_loss
from covft.models.packed_attention import packed_arguments, set_attention
from covft.registry import LLMS
from covft.weights import resolve, resolve_tokenizer


@LLMS.register_module()
class CausalLM(nn.Module):
    """Any causal LM of transformers, with its tokenizer.

    Args:
        weights: None (random), ``pretrained`` (those of the variant that ``arch`` names), or a
            folder or hub id with weights, tokenizer and config: an LLM's, or InternVL2's.
        arch: A name in ``variants``; or, where ``weights`` is None, a transformers config
            (``model_type`` and its fields). Left out, the weights' config.json decides.
        tokenizer: Folder or hub id of the tokenizer; by default that of ``weights``. A model
            without either can be built, but not be fed.
        template: Name of the conversation template that goes with this model.
        freeze: Whether its parameters are left as they are (stage 1 of LLaVA).
        freeze_embeddings: Leave the token embeddings, and an output layer tied to them, alone:
            in a small model they are a large part of each optimizer step, and change little.
        dtype: Parameter type, a torch name such as "float32" or "bfloat16".
        checkpointing: Which layers recompute their activations in the backward pass: False, True,
            "selective", a share, or a budget, see :mod:`covft.models.checkpointing`.
        lora: ``dict(rank=128, alpha=256, dropout=0.05, target=None)`` trains low-rank updates of
            the linear layers instead of the weights, see :mod:`covft.models.llm_adapters`.
        quantization: "nf4" keeps the linear layers' frozen weights in 4 bits (QLoRA); it needs
            bitsandbytes, and ``lora`` or ``freeze``. ``dtype`` is then that of the rest.
        attention: The kernel of the layers' attention: "auto", "varlen" (PyTorch's variable-length
            FlashAttention, for packed rows on GPUs in 16 bits), "flash_attention_2" (the package
            flash-attn) or "sdpa", see :mod:`covft.models.packed_attention`.

    Attributes:
        packing_obstacle: Why this LLM can't take packed rows; None if it can.

    Raises:
        ValueError: If ``weights`` and ``arch`` don't make a model, the model changes its logits
            after the output layer, or options don't go together.
        ImportError: If a package is missing that an option needs.
    """

    #: Published models by the name that ``arch`` takes.
    variants: ClassVar[Mapping[str, HubVariant]] = {
        "smollm2-135m": HubVariant(
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            {
                "model_type": "llama",
                "vocab_size": 49152,
                "hidden_size": 576,
                "intermediate_size": 1536,
                "num_hidden_layers": 30,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "max_position_embeddings": 8192,
                "rms_norm_eps": 1e-5,
                "rope_theta": 100000.0,
                "tie_word_embeddings": True,
            },
        )
    }
    #: transformers' ``model_type`` of the weights that this class is for; empty for any.
    model_types: ClassVar[tuple[str, ...]] = ()
    #: Template used when a config names none.
    default_template = "chatml"

    def __init__(
        self,
        *,
        weights: str | None = None,
        arch: str | Mapping[str, Any] | None = None,
        tokenizer: str | None = None,
        template: str | None = None,
        freeze: bool = False,
        freeze_embeddings: bool = False,
        dtype: str = "float32",
        checkpointing: Setting = False,
        lora: Mapping[str, Any] | None = None,
        quantization: str | None = None,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        low_rank = checked_options(
            lora, quantization, freeze=freeze, freeze_embeddings=freeze_embeddings
        )
        self.dtype = getattr(torch, dtype)
        origin = find_origin(self.variants, arch=arch, weights=weights, part="llm")
        #: Where the weights were read from; None if they are random.
        self.weights_folder = None if origin.source is None else resolve(origin.source)
        if self.weights_folder is not None:
            config = read_llm_config(self.weights_folder)
            if self.model_types and config.model_type not in self.model_types:
                raise ValueError(
                    f"'{self.weights_folder}' holds a {config.model_type}, {type(self).__name__} "
                    f"expects {' or '.join(self.model_types)}; change model.llm.type (CausalLM "
                    "takes any) or model.llm.weights"
                )
            origin.check(config)
            self.model: PreTrainedModel = load_llm(self.weights_folder, config, dtype=self.dtype)
        else:
            config = AutoConfig.for_model(**dict(origin.fields or {}))
            self.model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        folder = self.weights_folder if tokenizer is None else resolve_tokenizer(tokenizer)
        self.tokenizer = None if folder is None else _read_tokenizer(folder)
        self.template = template or self.default_template
        # Without one of its own, generation is greedy, whatever a model's authors recommend.
        self.model.generation_config = GenerationConfig()
        _check_plain_logits(self.model.config)
        self.packing_obstacle = set_attention(self.model, attention)
        as_output_layer(self.model.get_output_embeddings())
        if quantization is not None:
            quantize_linears(self.model)
        self.requires_grad_(not freeze and low_rank is None)
        if low_rank is not None:
            adapt_linears(self.model, low_rank, dtype=self.dtype)
        if freeze_embeddings:
            self.model.get_input_embeddings().requires_grad_(False)
        self.checkpointing = checkpointing

    @property
    def hidden_dim(self) -> int:
        """Width H of the embeddings."""
        return self.model.get_input_embeddings().weight.shape[1]

    @property
    def checkpointing(self) -> Setting:
        """The policy, as a config has it; False and True stand for "none" and "full"."""
        return self._checkpointing.setting

    @checkpointing.setter
    def checkpointing(self, setting: Setting) -> None:
        self._checkpointing = CheckpointingPolicy(setting, where="model.llm.checkpointing")
        if self._checkpointing and not self.layers:
            raise ValueError(
                f"transformers' {self.model.config.model_type} has no layers that can recompute "
                "their activations; set model.llm.checkpointing=False"
            )

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's layers, in their order."""
        parts = self.model.get_decoder().modules()
        return [part for part in parts if isinstance(part, GradientCheckpointingLayer)]

    def embed(self, input_ids: Tensor) -> Tensor:
        """Look up token embeddings, (B, T) to (B, T, H)."""
        return self.model.get_input_embeddings()(input_ids)

    def hidden_states(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Return the last layer's normalised states, (B, T, H).

        Args:
            inputs_embeds: Of a padded batch, (B, T, H), or a packed row, (1, T, H).
            attention_mask: True at real positions of a padded batch, (B, T).
            position_ids: Positions in a packed row, (1, T); by default counted in each sample.
            cu_seqlens: Where the samples of a packed row begin and the last one ends, (S + 1,).

        Raises:
            ValueError: If this LLM can't take packed rows.
        """
        if cu_seqlens is None:
            arguments: dict[str, Any] = {"attention_mask": attention_mask}
        elif self.packing_obstacle is None:
            arguments = packed_arguments(self.model, cu_seqlens, position_ids)
        else:
            raise ValueError(
                f"packed rows need another LLM: {self.packing_obstacle}; set "
                "train_dataloader.pack=False"
            )
        decoder = self.model.get_decoder()
        with self._checkpointing.applied_to_transformers(self.layers, inputs_embeds):
            output = decoder(inputs_embeds=inputs_embeds, use_cache=False, **arguments)
        return output.last_hidden_state

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Return vocabulary logits of any leading shape, (…, H) to (…, V)."""
        return self.model.get_output_embeddings()(hidden_states)

    def loss_sum(self, hidden_states: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy summed over N supervised positions, a scalar in nats.

        Args:
            hidden_states: Those positions' states, (N, H); N may be 0.
            targets: Their next tokens, (N,).
        """
        return supervised_loss(self.model.get_output_embeddings(), hidden_states, targets)

    def merged_state_dict(self) -> dict[str, Tensor]:
        """Return plain weights under transformers' names, on the CPU, for export.

        Updates are merged in and 4-bit weights are dequantised, both to ``dtype``. Tied weights are
        there under both names.
        """
        return merged_state_dict(self.model, dtype=self.dtype)


def _llama2(hidden: int, ffn: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }


@LLMS.register_module()
class Vicuna(CausalLM):
    """Vicuna-1.5 (Llama-2), with LLaVA's "v1" template."""

    variants = {  # noqa: RUF012
        "7b": HubVariant("lmsys/vicuna-7b-v1.5", _llama2(4096, 11008, 32, 32)),
        "13b": HubVariant("lmsys/vicuna-13b-v1.5", _llama2(5120, 13824, 40, 40)),
    }
    model_types = ("llama",)
    default_template = "v1"


def _phi3_mini(positions: int, sliding_window: int) -> dict[str, Any]:
    return {
        "model_type": "phi3",
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": positions,
        "original_max_position_embeddings": 4096,
        "sliding_window": sliding_window,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }


@LLMS.register_module()
class Phi3(CausalLM):
    """Phi-3-mini, with InternVL2's "phi3-chat" template.

    InternVL2-4B is built on "mini-128k"; ``weights="OpenGVLab/InternVL2-4B"`` takes its LLM. The
    long-context rope factors come with the weights; where they are random, rope is the plain one,
    which has the same parameters.
    """

    variants = {  # noqa: RUF012
        "mini-4k": HubVariant("microsoft/Phi-3-mini-4k-instruct", _phi3_mini(4096, 2047)),
        "mini-128k": HubVariant("microsoft/Phi-3-mini-128k-instruct", _phi3_mini(131072, 262144)),
    }
    model_types = ("phi3",)
    default_template = "phi3-chat"


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    options: dict[str, Any] = {"trust_remote_code": False}
    # transformers reads the config, too, and would stumble over the one of Phi-3's first release;
    # a tokenizer's folder may also have none, or one that nothing but its tokenizer is used of.
    with contextlib.suppress(ValueError):
        options["config"] = read_llm_config(folder)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), **options)
    return tokenizer


def _check_plain_logits(config: Any) -> None:
    """Refuse models whose forward changes the logits: the loss is taken from the output layer."""
    neutral = {"logits_scaling": 1, "logit_scale": 1, "final_logit_softcapping": None}
    for name, value in neutral.items():
        if getattr(config, name, value) != value:
            raise ValueError(
                f"{config.model_type} changes its logits ({name}={getattr(config, name)}), which "
                "the loss wouldn't; use an LLM without such a setting"
            )
