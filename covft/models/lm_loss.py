"""The language-model loss of supervised positions, without ever holding all logits.

The logits of one LLaVA-1.5 sample (884 positions, 32,000 words) take 113 MB in float32, and a
plain cross-entropy holds three arrays of that size at its peak; but only the answers' positions,
one in six, have a loss. Here the supervised positions are taken a chunk at a time: logits, their
loss and their gradient, which is known up to the loss's own, a factor, so that the forward pass
can already take it on to hidden states and weight. Nothing is computed twice, and one chunk's
logits are alive.
(The idea is that of Liger Kernel's fused linear cross-entropy, Hsu et al., 2024, arXiv 2410.10989,
in plain PyTorch.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

#: Logits of a chunk: 128 MiB in float32. At 32,000 words that is 1,024 rows, enough for matrix
#: products at a GPU's full speed.
CHUNK_LOGITS = 2**25
#: Rows of a chunk are a multiple of this, where there are as many.
_ROWS = 128


class OutputLayer(nn.Linear):
    """An LLM's output layer, which also goes straight to the loss.

    That is one of its calls, and not a function of its weight, because FSDP and ZeRO-3 gather a
    layer's weight for its calls.
    """

    def forward(self, hidden_states: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the logits, or with targets the sum of their cross-entropies.

        Args:
            hidden_states: Of any leading shape, (…, H); with targets (N, H).
            targets: Each row's next token, (N,).

        Returns:
            Logits, (…, V); or a scalar in nats, in float32 at least.
        """
        if targets is None:
            return super().forward(hidden_states)
        return cross_entropy_sum(hidden_states, self.weight, self.bias, targets)


def as_output_layer(layer: nn.Module) -> None:
    """Make a plain linear layer an :class:`OutputLayer`, in place; leave any other as it is."""
    if type(layer) is nn.Linear:  # a subclass may compute something else than x W + b
        layer.__class__ = OutputLayer


def supervised_loss(output_layer: nn.Module, hidden_states: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy summed over supervised positions.

    Args:
        output_layer: From hidden states (N, H) to logits (N, V). Other layers than an
            :class:`OutputLayer` compute each chunk's logits a second time in the backward pass.
        hidden_states: Those of the supervised positions alone, (N, H). N may be 0: the loss is then
            0, and has gradients of 0.
        targets: Each one's next token, (N,).

    Returns:
        A scalar in nats, in float32 at least.
    """
    if isinstance(output_layer, OutputLayer):
        return output_layer(hidden_states, targets)
    vocabulary = getattr(output_layer, "out_features", CHUNK_LOGITS // _ROWS)
    rows = _chunk_rows(vocabulary)
    losses = [
        checkpoint(_loss_of_logits, output_layer, *chunk, use_reentrant=False)
        for chunk in zip(hidden_states.split(rows), targets.split(rows), strict=True)
    ]
    return torch.stack(losses).sum()


def cross_entropy_sum(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    chunk_rows: int | None = None,
) -> Tensor:
    """Return the summed cross-entropy of ``hidden_states @ weight.T + bias``.

    Products are computed in autocast's type, or the weight's, softmax in float32 at least.
    Gradients are computed for the arguments that require one; the backward pass can run once.

    Args:
        hidden_states: (N, H).
        weight: (V, H).
        bias: (V,), or None.
        targets: Indices below V, (N,).
        chunk_rows: Rows whose logits are held at a time; by default as :data:`CHUNK_LOGITS` allows.

    Returns:
        A scalar in nats.
    """
    tracked = torch.is_grad_enabled()
    wanted = [
        tracked and tensor is not None and tensor.requires_grad
        for tensor in (hidden_states, weight, bias)
    ]
    rows = chunk_rows or _chunk_rows(len(weight))
    loss: Tensor = _CrossEntropySum.apply(hidden_states, weight, bias, targets, wanted, rows)
    return loss


def _chunk_rows(vocabulary: int) -> int:
    return max(1, CHUNK_LOGITS // (vocabulary * _ROWS)) * _ROWS


def _loss_of_logits(layer: nn.Module, hidden_states: Tensor, targets: Tensor) -> Tensor:
    logits = layer(hidden_states)
    exact = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(exact), targets, reduction="sum")


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        wanted: list[bool],
        rows: int,
    ) -> Tensor:
        dtype = _compute_dtype(weight)
        sums = _Gradients(hidden_states, weight, bias, wanted)
        with torch.autocast(weight.device.type, enabled=False):
            matrix = weight.to(dtype)
            offset = None if bias is None else bias.to(dtype)
            loss = weight.new_zeros((), dtype=torch.promote_types(dtype, torch.float32))
            for start in range(0, max(1, len(hidden_states)), rows):
                stop = start + rows
                x = hidden_states[start:stop].to(dtype)
                logits = F.linear(x, matrix, offset).to(loss.dtype)
                loss += _loss_and_gradient_(logits, targets[start:stop], gradient=any(wanted))
                if any(wanted):
                    is_last = stop >= len(hidden_states)
                    sums.add(start, x, matrix, logits.to(dtype), is_last=is_last)
                del logits  # before the next chunk's are there
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(sums.hidden_states, sums.bias, sums.weight, *sums.last)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # In place, as they may be large. A second backward pass finds their versions changed, and
        # raises.
        saved = ctx.saved_tensors
        states, bias, weight = (None if x is None else x.mul_(grad) for x in saved[:3])
        if len(saved) > 3:
            grad_logits, x = saved[3:]
            with torch.autocast(grad.device.type, enabled=False):
                scaled = (x * grad).to(x.dtype)
                weight = _plus_product(weight, grad_logits.T, scaled, dtype=ctx.weight_dtype)
        return states, weight, bias, None, None, None


class _Gradients:
    """The gradients of the summed loss, as far as they are wanted; chunks are added to them.

    Attributes:
        hidden_states: (N, H).
        bias: (V,).
        weight: That of all chunks but the last, (V, H); None if there is one alone. In the weight's
            type, as gradient accumulation over micro-batches rounds, too.
        last: The last chunk's factors of the weight's gradient: that of the logits (n, V) and the
            states (n, H). Their product is left to the backward pass, which can scale them before
            it; the weight's gradient, where it takes no more than this, is written only once.
    """

    def __init__(
        self, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool]
    ) -> None:
        self.hidden_states = torch.empty_like(hidden_states) if wanted[0] else None
        self.bias = torch.zeros_like(bias) if bias is not None and wanted[2] else None
        self.weight: Tensor | None = None
        self.last: tuple[Tensor, ...] = ()
        self._weight_dtype = weight.dtype if wanted[1] else None

    def add(
        self, start: int, x: Tensor, matrix: Tensor, grad_logits: Tensor, *, is_last: bool
    ) -> None:
        """Add a chunk's, given its first row, its states, and its logits' gradient (n, V)."""
        if self.hidden_states is not None:
            self.hidden_states[start : start + len(x)] = grad_logits @ matrix
        if self.bias is not None:
            self.bias += grad_logits.sum(0)
        if self._weight_dtype is not None and is_last:
            self.last = grad_logits, x
        elif self._weight_dtype is not None:
            self.weight = _plus_product(self.weight, grad_logits.T, x, dtype=self._weight_dtype)


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return ``total + a @ b`` in a type, ``total`` being changed in place, or None for zeros."""
    if total is None:
        return (a @ b).to(dtype)
    return total.addmm_(a, b) if total.dtype == a.dtype else total.add_(a @ b)


def _loss_and_gradient_(logits: Tensor, targets: Tensor, *, gradient: bool) -> Tensor:
    """Return the summed loss of logits (n, V), and put its gradient in their place.

    In place and step by step, because ``log_softmax`` and its backward would hold three more
    arrays of their size.
    """
    index = targets[:, None]
    logits -= logits.amax(1, keepdim=True)
    of_targets = logits.gather(1, index)
    total = logits.exp_().sum(1, keepdim=True)
    if gradient:
        logits /= total
        logits.scatter_add_(1, index, torch.full_like(of_targets, -1))
    return (total.log() - of_targets).sum()


def _compute_dtype(weight: Tensor) -> torch.dtype:
    device_type = weight.device.type
    if torch.is_autocast_enabled(device_type) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return weight.dtype
