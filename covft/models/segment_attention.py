"""Causal attention within the samples of a packed row, on any device and in any type.

One operator, so that a compiled layer is one graph whatever the samples' lengths are. Its backward
pass computes the weights again, sample by sample.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# An exported model has a copy of this file; in one process, its operators aren't these.
_OPERATOR = "covft::" + re.sub(r"\W", "_", __name__)


@torch.library.custom_op(_OPERATOR, mutates_args=())
def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float, left: int
) -> Tensor:
    """Attend within each sample.

    Args:
        query: (T, Hq, D).
        key: (T, Hkv, D), where Hkv divides Hq.
        value: Like ``key``.
        cu_seqlens: Where each sample begins and the last one ends, (S + 1,).
        scale: Factor of the products.
        left: How many positions before its own each sees; -1 for all.

    Returns:
        (T, Hq, D).
    """
    out = query.new_empty(query.shape)
    for start, stop in _segments(cu_seqlens):
        q, k, v = (states[start:stop].transpose(0, 1)[None] for states in (query, key, value))
        hidden = left >= 0 and stop - start > left + 1
        seen = _seen(stop - start, left, query.device) if hidden else None
        attended = F.scaled_dot_product_attention(
            q, k, v, seen, is_causal=not hidden, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        out[start:stop] = attended[0].transpose(0, 1)
    return out


@torch.library.custom_op(f"{_OPERATOR}_backward", mutates_args=())
def _segment_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    left: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    grads = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    exact = torch.promote_types(query.dtype, torch.float32)
    for start, stop in _segments(cu_seqlens):
        g, q, k, v, o = (x[start:stop].to(exact) for x in (grad, query, key, value, out))
        seen = _seen(stop - start, left, query.device)
        # Autocast, where the caller's backward runs inside of it, would round the products.
        with torch.autocast(query.device.type, enabled=False):
            parts = _plain_gradients(g, q, k, v, o, seen, scale)
        for whole, part in zip(grads, parts, strict=True):
            whole[start:stop] = part
    return grads


def _plain_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, seen: Tensor, scale: float
) -> list[Tensor]:
    """Return attention's gradients by the book, for one sample of L tokens.

    Args:
        grad: That of ``out``, (L, Hq, D).
        query: (L, Hq, D).
        key: (L, Hkv, D).
        value: (L, Hkv, D).
        out: What attention gave, (L, Hq, D).
        seen: Which keys a query sees, (L, L).
        scale: Factor of the products.
    """
    groups = query.shape[1] // key.shape[1]
    q, g, o = (x.unflatten(1, (-1, groups)).permute(1, 2, 0, 3) for x in (query, grad, out))
    k, v = (x.permute(1, 0, 2)[:, None] for x in (key, value))  # (Hkv, 1, L, D)
    scores = (scale * (q @ k.mT)).masked_fill_(~seen, -torch.inf)
    weights = scores.softmax(-1)
    grad_weights = g @ v.mT - (g * o).sum(-1, keepdim=True)
    grad_scores = grad_weights.mul_(weights)
    grad_query = scale * (grad_scores @ k)
    grad_key = scale * (grad_scores.mT @ q).sum(1)
    grad_value = (weights.mT @ g).sum(1)
    return [
        grad_query.permute(2, 0, 1, 3).flatten(1, 2),
        grad_key.transpose(0, 1),
        grad_value.transpose(0, 1),
    ]


def _segments(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise(cu_seqlens.tolist()))


def _seen(length: int, left: int, device: torch.device) -> Tensor:
    """Return which of so many positions (columns) each (row) sees, (L, L)."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen.triu(-left) if left >= 0 else seen


@segment_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, cu: Tensor, scale: float, left: int) -> Tensor:
    return query.new_empty(query.shape)


@_segment_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(states.new_empty(states.shape) for states in (query, key, value))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, cu_seqlens, ctx.scale, ctx.left = inputs
    ctx.save_for_backward(query, key, value, output, cu_seqlens)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _segment_attention_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.left)
    return (*grads, None, None, None)


segment_attention.register_autograd(_backward, setup_context=_save)
