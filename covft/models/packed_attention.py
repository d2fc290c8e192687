"""Attention over packed rows: samples side by side in one row, none of which sees another.

transformers' layers take their attention from a registry by name, and hand on to it what the
model's forward was given beyond its own arguments; so a packed row's bounds reach any LLM's layers
under the names that transformers has for FlashAttention. Two kernels are behind it:

* PyTorch's ``varlen_attn`` on GPUs, in 16 bits;
* elsewhere ``scaled_dot_product_attention`` sample by sample, as one operator, so that a compiled
  layer is one graph whatever the samples' lengths are.

Padded batches and generation come without bounds and get what ``sdpa`` would have given them.

Restarted positions with a mask of ones, which look right, are no substitute: every sample would
then see all those before it.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from covft.conversation import IGNORE_INDEX
from covft.models.segment_attention import segment_attention
from covft.registry import nearest

#: What ``llm.attention`` can be.
ATTENTIONS = ("auto", "varlen", "flash_attention_2", "sdpa")
#: What is asked of ``varlen_attn`` by name; not all of it is in the first versions that have it.
_VARLEN_OPTIONS = ("scale", "window_size", "enable_gqa")
#: Kinds of layers that look at other positions by attention alone, as config.layer_types has them.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


def set_attention(model: PreTrainedModel, attention: str) -> str | None:
    """Choose how an LLM's layers attend, packed rows included.

    Args:
        model: The LLM; its config's implementation is set, which isn't saved with the config.
        attention: "auto" takes ``varlen_attn`` where it can run and sdpa elsewhere, and leaves an
            LLM alone that can't take packed rows; "varlen" and "sdpa" take these alone;
            "flash_attention_2" is transformers' own, by the package flash-attn.

    Returns:
        Why the LLM can't take packed rows; None if it can.

    Raises:
        ValueError: If there is no such choice, or the LLM can't follow it.
        ImportError: If flash-attn isn't installed.
    """
    if attention not in ATTENTIONS:
        raise ValueError(
            f"llm.attention '{attention}' is unknown; {nearest(attention, ATTENTIONS)}"
        )
    obstacle = _packing_obstacle(model)
    if attention == "flash_attention_2":
        _set_flash_attention(model)
    elif obstacle is None:
        model.set_attn_implementation(_registered_name(attention))
    elif attention != "auto":
        raise ValueError(
            f"llm.attention='{attention}' isn't possible: {obstacle}; leave it out, so that "
            "transformers chooses"
        )
    return obstacle


def packed_arguments(
    model: PreTrainedModel, cu_seqlens: Tensor, position_ids: Tensor | None
) -> dict[str, Any]:
    """Return what a decoder's forward takes besides a packed row's embeddings.

    Args:
        model: The LLM, after :func:`set_attention`.
        cu_seqlens: Where each sample begins and the last one ends, (S + 1,) int32.
        position_ids: Each token's position in its sample, (1, T); by default counted from 0.
    """
    if position_ids is None:
        lengths = cu_seqlens.diff()
        starts = cu_seqlens[:-1].repeat_interleave(lengths)
        position_ids = (torch.arange(len(starts), device=starts.device) - starts)[None]
    longest = int(cu_seqlens.diff().max())
    mask = None
    if model.config._attn_implementation in _registered_names():
        # transformers hands a mask of 4 dimensions on as it is, instead of building one of T x T.
        # This one suits nothing: a layer that forgets the bounds fails.
        mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=cu_seqlens.device)
    return {
        "attention_mask": mask,
        "position_ids": position_ids,
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def check_bounds(cu_seqlens: Tensor, input_ids: Tensor, labels: Tensor) -> None:
    """Check that a packed row is what its bounds say.

    Args:
        cu_seqlens: (S + 1,) int32.
        input_ids: (1, T).
        labels: (1, T).

    Raises:
        ValueError: If they don't go together, or a sample's first token would be learnt from the
            sample before.
    """
    advice = "; collate it with Collator(spec, pack=True)"
    if input_ids.ndim != 2 or len(input_ids) != 1:
        raise ValueError(f"a packed batch is one row, got {tuple(input_ids.shape)}{advice}")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or len(cu_seqlens) < 2:
        raise ValueError(
            "cu_seqlens must be the bounds (S + 1,) of S samples in int32, got "
            f"{tuple(cu_seqlens.shape)} in {cu_seqlens.dtype}{advice}"
        )
    bounds, length = cu_seqlens.tolist(), input_ids.shape[1]
    ascending = all(start < stop for start, stop in itertools.pairwise(bounds))
    if bounds[0] != 0 or bounds[-1] != length or not ascending:
        raise ValueError(
            f"cu_seqlens must ascend from 0 to the row's {length} tokens, got {bounds}{advice}"
        )
    learnt = (labels[0, cu_seqlens[:-1]] != IGNORE_INDEX).nonzero().flatten().tolist()
    if learnt:
        raise ValueError(
            f"the first label of sample {learnt[0]} isn't ignored: it would be learnt from the "
            f"sample before{advice}"
        )


def _registered_name(attention: str) -> str:
    # Exported models bring a copy of this module, which must not take this one's place.
    return f"{__name__.replace('.', '_')}_{attention}"


@functools.cache
def _registered_names() -> frozenset[str]:
    return frozenset(_registered_name(attention) for attention in ("auto", "varlen", "sdpa"))


def _packing_obstacle(model: PreTrainedModel) -> str | None:
    """Return what keeps an LLM from taking packed rows.

    A model that can do FlashAttention tells its attention all there is to know (window, scale) by
    arguments, as no mask is there to say it; one that is stateful carries more along the row.
    """
    name, config = type(model).__name__, model.config
    others = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if not (model._supports_attention_backend and model._supports_flash_attn):
        return f"{name} doesn't take its attention from transformers' AttentionInterface"
    if config._attn_implementation != "sdpa":  # such as attention sinks, which sdpa can't do
        return f"{name} isn't computed by sdpa, but by '{config._attn_implementation}'"
    if model._is_stateful or others:
        return (
            f"{name} has layers other than attention ({', '.join(sorted(others)) or 'recurrent'})"
        )
    if getattr(config, "attention_chunk_size", None):
        return f"{name} attends in chunks of {config.attention_chunk_size}"
    return None


def _set_flash_attention(model: PreTrainedModel) -> None:
    if importlib.util.find_spec("flash_attn") is None:
        raise ImportError(
            "llm.attention='flash_attention_2' needs the package 'flash-attn'; install it with "
            "`pip install flash-attn --no-build-isolation`, or leave llm.attention out: PyTorch's "
            "own kernel is the same on GPUs from Ampere on"
        )
    if not model._supports_flash_attn:
        raise ValueError(
            f"llm.attention='flash_attention_2': {type(model).__name__} can't do it; leave it out"
        )
    model.set_attn_implementation("flash_attention_2")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kernel: str,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as a transformers layer asks for it.

    Args:
        module: The layer's attention.
        query: (B, Hq, T, D); key and value (B, Hkv, T, D), where Hkv divides Hq.
        key: See query.
        value: See query.
        attention_mask: Of a padded batch; without meaning for a packed row.
        kernel: "auto", "varlen" or "sdpa".
        dropout: Rate on the attention's weights.
        scaling: Factor of the products; by default D to the power of -1/2.
        sliding_window: Each position sees so many, itself included; None for all before it.
        cu_seq_lens_q: Bounds of a packed row's samples, (S + 1,); None in a padded batch.
        max_length_q: Length of the longest sample.
        kwargs: What else transformers says; of no effect on packed rows, or an error.

    Returns:
        The attended values, (B, T, Hq, D), and None for the weights.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        if attention_mask is not None and attention_mask.shape[-1] == 0:
            raise ValueError(
                f"{type(module).__name__} wasn't told the bounds of a packed row's samples, and "
                "would mix them; set train_dataloader.pack=False for this LLM"
            )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _check_options(module, dropout, kwargs)
    q, k, v = (_autocast(states)[0].transpose(0, 1) for states in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    left = -1 if sliding_window is None else sliding_window - 1
    obstacle = _varlen_obstacle(q)
    if kernel == "varlen" and obstacle is not None:
        raise ValueError(f"llm.attention='varlen' isn't possible: {obstacle}; leave it out")
    if kernel != "sdpa" and obstacle is None:
        out = varlen_attention(q, k, v, cu_seq_lens_q, max_length_q, scale=scale, left=left)
    else:
        out = segment_attention(q, k, v, cu_seq_lens_q, scale, left)
    return out[None], None


def _check_options(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    given = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if dropout:
        given.append(f"dropout={dropout}")
    if given:
        raise ValueError(
            f"{type(module).__name__} asks for {', '.join(given)}, which attention over packed "
            "rows doesn't have; set train_dataloader.pack=False, or attention_dropout=0 in llm.arch"
        )


def _autocast(states: Tensor) -> Tensor:
    """Return them in autocast's type, in which sdpa would compute: operators of ours don't know."""
    device = states.device.type
    if torch.is_autocast_enabled(device) and states.dtype != torch.float64:
        return states.to(torch.get_autocast_dtype(device))
    return states


def _varlen_obstacle(query: Tensor) -> str | None:
    if not query.is_cuda:
        return f"varlen_attn runs on CUDA devices, the model is on '{query.device.type}'"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"varlen_attn computes in 16 bits, not {query.dtype}; set precision='bf16'"
    if query.shape[-1] % 8 or query.shape[-1] > 256:
        return f"varlen_attn takes heads of up to 256, by 8, not {query.shape[-1]}"
    return _device_obstacle(query.device.index)


@torch.compiler.assume_constant_result  # a compiled layer doesn't trace the look into the hardware
def _device_obstacle(index: int) -> str | None:
    return _found_device_obstacle(index)


@functools.cache
def _found_device_obstacle(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"varlen_attn needs compute capability 8.0, this GPU has {capability}"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"PyTorch {torch.__version__} is too old: it has no varlen_attn"
    taken = inspect.signature(_varlen_attn()).parameters
    lacking = [name for name in _VARLEN_OPTIONS if name not in taken]
    if lacking:
        return f"PyTorch {torch.__version__} is too old: its varlen_attn has no {lacking[0]}"
    return None


def _varlen_attn() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn  # exported models run on older versions, too

    return varlen_attn


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    *,
    scale: float,
    left: int,
) -> Tensor:
    """Attend within each sample by PyTorch's FlashAttention.

    Args:
        query: (T, Hq, D), 16 bits, on a GPU.
        key: (T, Hkv, D), where Hkv divides Hq.
        value: Like ``key``.
        cu_seqlens: (S + 1,) int32.
        longest: Length of the longest sample.
        scale: Factor of the products.
        left: How many positions before its own each sees; -1 for all.

    Returns:
        (T, Hq, D).
    """
    out: Tensor = _varlen_attn()(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        scale=scale,
        window_size=(left, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out


for _kernel in ("auto", "varlen", "sdpa"):
    _name = _registered_name(_kernel)
    AttentionInterface.register(_name, functools.partial(_attend, kernel=_kernel))
    AttentionMaskInterface.register(_name, sdpa_mask)
