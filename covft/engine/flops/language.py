"""Counters of the LLM and the frozen text encoder, per token and per pair of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from covft.engine.flops.tally import Flops, Stream, Tally, count, count_as, counts, low_rank
from covft.models.llm import CausalLM
from covft.models.llm_adapters import LowRankUpdate
from covft.models.lm_loss import OutputLayer
from covft.models.text_encoder import FrozenTextEncoder, LLMEmbeddings, TextEncoder


@dataclass(frozen=True)
class LanguageFlops:
    """What an LLM's operations grow with.

    Attributes:
        per_token: Linear layers, for each token.
        per_pair: Attention, for each pair of a query and a key that it sees, by the length of the
            layers' sliding window (None: the whole sample).
        per_logit_row: The output layer, for each position that it is computed at.
    """

    per_token: Flops
    per_pair: Mapping[int | None, Flops]
    per_logit_row: Flops

    def states(self, length: int, *, new: int | None = None) -> Flops:
        """Return the operations of a sample's hidden states.

        Args:
            length: Its tokens.
            new: The last ones of them that are computed, the others' keys and values being cached;
                all by default.
        """
        new = length if new is None else new
        flops = self.per_token * new
        for window, per_pair in self.per_pair.items():
            flops += per_pair * (causal_pairs(length, window) - causal_pairs(length - new, window))
        return flops


def causal_pairs(length: int, window: int | None) -> float:
    """Return the pairs of query and key of a causal attention: half of the square, as is usual."""
    inside = length if window is None else min(length, window)
    return inside * inside / 2 + (length - inside) * inside


def llm_flops(llm: CausalLM, *, inputs_need_grad: bool) -> LanguageFlops:
    """Count an LLM.

    Args:
        llm: The LLM.
        inputs_need_grad: Whether something trainable lies before the embeddings it is given.

    Raises:
        ValueError: If it isn't a decoder of the usual build (Llama, Phi-3, Qwen and the like).
    """
    model = llm.model
    decoder: Any = model.get_decoder()
    tokens, pairs = Tally(), dict[int | None, Flops]()
    grad = inputs_need_grad | tokens.uses(*model.get_input_embeddings().parameters())
    for index, layer in enumerate(_part(decoder, "layers")):
        window = _window(model.config, index)
        attention = Tally()
        _decoder_layer(attention, layer, Stream(0, grad), pairs=1)
        pairs[window] = pairs.get(window, Flops()) + attention.flops
        grad = _decoder_layer(tokens, layer, Stream(1, grad), pairs=0).grad
    grad |= tokens.uses(*_part(decoder, "norm").parameters())
    head = Tally()
    output: Any = model.get_output_embeddings()
    count(head, output, Stream(1, grad))
    tokens.uses(*output.parameters())
    tokens.check_complete(llm, where=f"the LLM ({model.config.model_type})")
    return LanguageFlops(tokens.flops, pairs, head.flops)


def text_encoder_flops(encoder: FrozenTextEncoder, length: int) -> Flops:
    """Count a frozen text encoder's forward for a text of ``length`` tokens.

    Raises:
        ValueError: If its matrices aren't all linear layers and embeddings.
    """
    tally = Tally()
    if isinstance(encoder, LLMEmbeddings):
        tally.uses(encoder.table)
    elif isinstance(encoder, TextEncoder):
        config = encoder.model.config
        for module in encoder.model.modules():
            if isinstance(module, nn.Linear):
                count(tally, module, Stream(length, False))
            elif not list(module.children()) and _is_table_or_norm(module):
                tally.uses(*module.parameters())
        tokens = Stream(length, False)
        for _ in range(config.num_hidden_layers):
            tally.attention(config.hidden_size, tokens, tokens, tokens)
    tally.check_complete(encoder, where=f"the text encoder ({type(encoder).__name__})")
    return Flops(tally.forward)


@counts(LowRankUpdate)
def _adapted_linear(tally: Tally, module: Any, x: Stream) -> Stream:
    return count_as(tally, nn.Linear, module, x).after(low_rank(tally, module, x).grad)


@counts(OutputLayer)
def _output_layer(tally: Tally, module: OutputLayer, x: Stream) -> Stream:
    return count_as(tally, nn.Linear, module, x)


def _decoder_layer(tally: Tally, layer: Any, x: Stream, *, pairs: float) -> Stream:
    """Count a layer's linear parts for the tokens of ``x``, and its attention for ``pairs``."""
    attn, mlp = _part(layer, "self_attn"), _part(layer, "mlp")
    norms = list(layer.parameters(recurse=False))
    for child in (*layer.children(), *attn.children()):
        if child is not attn and child is not mlp and _is_table_or_norm(child):
            norms += list(child.parameters())
    x = x.after(tally.uses(*norms))
    query, key, value = _projected(tally, attn, x)
    width = int(_part(attn, "config").num_attention_heads) * int(_part(attn, "head_dim"))
    seen = tally.attention(
        width, Stream(pairs, query.grad), Stream(1, key.grad), Stream(1, value.grad)
    )
    x = x.after(count(tally, _part(attn, "o_proj"), Stream(x.rows, seen.grad)).grad)
    return x.after(_gated_mlp(tally, mlp, x).grad)


def _projected(tally: Tally, attn: Any, x: Stream) -> list[Stream]:
    if hasattr(attn, "qkv_proj"):  # Phi-3
        return [count(tally, attn.qkv_proj, x)] * 3
    return [count(tally, _part(attn, name), x) for name in ("q_proj", "k_proj", "v_proj")]


def _gated_mlp(tally: Tally, mlp: Any, x: Stream) -> Stream:
    names = ("gate_up_proj",) if hasattr(mlp, "gate_up_proj") else ("gate_proj", "up_proj")
    grads = [count(tally, _part(mlp, name), x).grad for name in names]
    return count(tally, _part(mlp, "down_proj"), Stream(x.rows, any(grads)))


def _part(module: nn.Module, name: str) -> Any:
    part = getattr(module, name, None)
    if part is None:
        raise ValueError(
            f"no counter of operations for {type(module).__name__}, which has no '{name}': only "
            "decoders built like Llama, Qwen or Phi-3 are counted (covft.engine.flops.language)"
        )
    return part


def _is_table_or_norm(module: nn.Module) -> bool:
    """Tell whether a module without children has no matrix that it multiplies by."""
    is_vector = all(len(getattr(p, "ds_shape", p.shape)) <= 1 for p in module.parameters())
    return isinstance(module, nn.Embedding) or is_vector


def _window(config: Any, index: int) -> int | None:
    """Return the length of a layer's sliding window, None where it sees the whole sample."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[index] != "sliding_attention":
        return None
    return window
