"""A gated sum of feed-forward networks (FFNs) that keeps little for the backward pass.

CoVFT, section 3.4, eq. 10: ``sum_e g_e FFN_e(x)``, the experts' weights stored side by side. Plain
autograd keeps several tensors of the hidden width; this function keeps the pre-activation alone,
or, with ``recompute``, only its input, and redoes the rest in the backward pass. One expert at
weight 1 is a plain FFN.

Every activation is written as ``act(a) = base(k a) / k``. QuickGELU is then the SiLU of ``k a``
with k = 1.702, and neither factor costs a pass over the hidden units: matrix products scale for
free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import is_autocast_available as has_autocast
from torch.autograd.function import once_differentiable

from covft.models.vision.vit import QuickGELU
from covft.registry import nearest


@dataclass(frozen=True)
class _Activation:
    """``base(scale a) / scale``.

    Attributes:
        scale: k.
        base: A new tensor ``base(s)``.
        base_: The same, written over ``s``.
        times_derivative: ``grad base'(s)`` from (grad, s).
    """

    scale: float
    base: Callable[[Tensor], Tensor]
    base_: Callable[[Tensor], Tensor]
    times_derivative: Callable[[Tensor, Tensor], Tensor]


def _gelu(approximate: str) -> _Activation:
    return _Activation(
        scale=1.0,
        base=partial(F.gelu, approximate=approximate),
        base_=partial(torch.ops.aten.gelu_.default, approximate=approximate),
        times_derivative=partial(torch.ops.aten.gelu_backward.default, approximate=approximate),
    )


_ACTIVATIONS = {
    "quick_gelu": _Activation(
        scale=1.702,
        base=F.silu,
        base_=partial(F.silu, inplace=True),
        times_derivative=torch.ops.aten.silu_backward.default,
    ),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
}


def act_name(module: nn.Module) -> str:
    """Return the name of an FFN's activation, as :func:`gated_ffn` takes it.

    Raises:
        ValueError: If it is none that :func:`covft.models.vision.vit.activation` builds.
    """
    if isinstance(module, QuickGELU):
        return "quick_gelu"
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    raise ValueError(
        f"expected an FFN whose activation is one of {', '.join(_ACTIVATIONS)}, found {module}; "
        "experts can't be made of it, see `act` in the encoder's ViTConfig"
    )


def gated_ffn(
    x: Tensor,
    gates: Tensor | None,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    *,
    act: str,
    recompute: bool = False,
) -> Tensor:
    """Return ``sum_e gates_e (act(x up_e^T + up_bias_e) down_e^T + down_bias_e)``.

    Under autocast it computes in autocast's type, as linear layers do. Gradients of gradients
    aren't supported.

    Args:
        x: Tokens, (I, N, D); any (..., D) without gates.
        gates: Each image's weights for the experts, (I, E), any real numbers; None: a single FFN
            at weight 1.
        up: The experts' up-projections, one below the other, (E F, D).
        up_bias: (E F,).
        down: Their down-projections, side by side, (D, E F).
        down_bias: (E, D); (D,) without gates.
        act: "quick_gelu", "gelu" or "gelu_tanh".
        recompute: Keep only the inputs and redo the first matrix product in the backward pass.

    Returns:
        Like ``x``.

    Raises:
        ValueError: If the activation is unknown.
    """
    if act not in _ACTIVATIONS:
        raise ValueError(f"activation '{act}' is unknown; {nearest(act, _ACTIVATIONS)}")
    device = x.device.type
    if has_autocast(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    inputs = _Inputs(x, gates, up, up_bias, down, down_bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _GatedFFN.apply(*inputs, act, recompute)
    return _forward(inputs, _ACTIVATIONS[act])


class _GatedFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, act, recompute = args
        kept: list[Tensor] | None = None if recompute else []
        out = _forward(_Inputs(*tensors), _ACTIVATIONS[act], kept)
        # Weights are kept as they are, not in autocast's type: copies of them would be held for
        # every layer until the backward pass.
        ctx.save_for_backward(*tensors, *(kept or ()))
        ctx.act = act
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Read once: under activation checkpointing a second reading is refused.
        x, gates, up, up_bias, down, down_bias, *kept = ctx.saved_tensors
        inputs = _Inputs(x, gates, up, up_bias, down, down_bias)
        activation, needs = _ACTIVATIONS[ctx.act], ctx.needs_input_grad[:6]
        return (*_backward(grad, inputs, activation, kept, needs), None, None)


class _Inputs(NamedTuple):
    """The tensors that :func:`gated_ffn` takes; weights are read in the type of ``x``."""

    x: Tensor
    gates: Tensor | None
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor

    @property
    def rows(self) -> Tensor:
        """The tokens of all images, (I N, D)."""
        return self.x.reshape(-1, self.x.shape[-1])

    def groups(self) -> Iterator[tuple[slice, Tensor | None]]:
        """Yield hidden units of experts that are computed together, and gates (I, 1, experts, 1).

        Without gates there is one group, and its gates are None.
        """
        if self.gates is None:
            yield slice(0, len(self.up)), None
            return
        num_experts = self.gates.shape[1]
        width = len(self.up) // num_experts
        step = _experts_at_once(self.x.device, num_experts)
        for first in range(0, num_experts, step):
            last = min(first + step, num_experts)
            gate = self.gates[:, None, first:last, None].to(self.x.dtype)
            yield slice(first * width, last * width), gate

    def up_part(self, hidden: slice) -> Tensor:
        """Return the up-projection of hidden units, (units, D)."""
        return self.up[hidden].to(self.x.dtype)

    def down_part(self, hidden: slice) -> Tensor:
        """Return the down-projection of hidden units, (D, units)."""
        return self.down[:, hidden].to(self.x.dtype)

    def pre_activation(self, hidden: slice, scale: float) -> Tensor:
        """Return the pre-activation of hidden units times ``scale``, (I N, units)."""
        bias = scale * self.up_bias[hidden].to(self.x.dtype)
        return torch.addmm(bias, self.rows, self.up_part(hidden).t(), alpha=scale)

    def output_bias(self) -> Tensor:
        """Return the down-projections' biases weighted by the gates, for each row, (I N, D)."""
        if self.gates is None:
            return self.down_bias.to(self.x.dtype).repeat(len(self.rows), 1)
        bias = self.gates @ self.down_bias.to(self.gates.dtype)
        return bias.to(self.x.dtype).repeat_interleave(self.x.shape[1], dim=0)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context in which every operation keeps its inputs' type."""
    return torch.autocast(device, enabled=False) if has_autocast(device) else nullcontext()


def _experts_at_once(device: torch.device, num_experts: int) -> int:
    """Return how many experts are computed together.

    One on the CPU: its temporaries stay small enough for malloc to reuse, and a fresh one costs
    page faults, a tenth of its matrix product's time. All of them elsewhere: fewer and larger
    kernels, and no sum over experts is rounded in between.
    """
    return 1 if device.type == "cpu" else num_experts


def _forward(inputs: _Inputs, act: _Activation, kept: list[Tensor] | None = None) -> Tensor:
    """Compute the output; append the pre-activations, times k, to ``kept`` if there is one."""
    with _without_autocast(inputs.x.device.type):
        out = inputs.output_bias()
        for hidden, gate in inputs.groups():
            s = inputs.pre_activation(hidden, act.scale)
            if kept is None:
                h = act.base_(s)
            else:
                h = act.base(s)
                kept.append(s)
            out.addmm_(_weigh_(h, gate), inputs.down_part(hidden).t(), alpha=1 / act.scale)
    return out.view(inputs.x.shape)


def _backward(
    grad: Tensor,
    inputs: _Inputs,
    act: _Activation,
    kept: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of ``inputs``, None for those that ``needs`` leaves out."""
    with _without_autocast(grad.device.type):
        gradients = _Gradients(grad, inputs, needs)
        for n, (hidden, gate) in enumerate(inputs.groups()):
            s = kept[n] if kept else inputs.pre_activation(hidden, act.scale)
            gradients.add(hidden, gate, s, act)
        return gradients.result()


class _Gradients:
    """The gradients of :class:`_Inputs`, built up group by group; None where not needed."""

    def __init__(self, grad: Tensor, inputs: _Inputs, needs: Sequence[bool]) -> None:
        self.inputs = inputs
        self.needs_pre_activation = needs[0] or needs[2] or needs[3]
        self.grad, self.rows = grad.reshape(-1, grad.shape[-1]), inputs.rows
        self.x = self.rows.new_zeros(self.rows.shape) if needs[0] else None
        self.up, self.up_bias, self.down = (
            torch.empty_like(weight, dtype=grad.dtype) if need else None
            for weight, need in zip(inputs[2:5], needs[2:5], strict=True)
        )
        self.gates: list[Tensor] | None = None
        self.down_bias: Tensor | None = None
        if inputs.gates is None:
            self.down_bias = self.grad.sum(0) if needs[5] else None
            return
        per_image = grad.sum(1, dtype=inputs.gates.dtype)
        if needs[1]:
            self.gates = [per_image @ inputs.down_bias.to(per_image.dtype).t()]
        if needs[5]:
            self.down_bias = inputs.gates.t() @ per_image

    def add(self, hidden: slice, gate: Tensor | None, s: Tensor, act: _Activation) -> None:
        """Add what the hidden units with pre-activation ``s``, times k, contribute."""
        h = act.base(s)
        if self.needs_pre_activation or self.gates is not None:
            dh = self.grad @ self.inputs.down_part(hidden)
            if self.gates is not None and gate is not None:
                products = _per_expert(h * dh, gate)
                self.gates.append(products.sum((1, 3), dtype=self.gates[0].dtype) / act.scale)
                del products
        if self.down is not None:
            # Written where it belongs: a concatenation would copy all of the weight's gradient.
            self.down[:, hidden].addmm_(
                self.grad.t(), _weigh_(h, gate), beta=0, alpha=1 / act.scale
            )
        del h
        if self.needs_pre_activation:
            self._add_inner(hidden, act.times_derivative(_weigh_(dh, gate), s))

    def _add_inner(self, hidden: slice, grad: Tensor) -> None:
        """Add the contribution of the gradient (I N, units) of a pre-activation."""
        if self.x is not None:
            self.x.addmm_(grad, self.inputs.up_part(hidden))
        if self.up is not None:
            self.up[hidden].addmm_(grad.t(), self.rows, beta=0)
        if self.up_bias is not None:
            self.up_bias[hidden] = grad.sum(0)

    def result(self) -> tuple[Tensor | None, ...]:
        """Return the gradients in the order, shapes and types of the inputs."""
        x = None if self.x is None else self.x.view(self.inputs.x.shape)
        gates = None
        if self.gates is not None:
            of_bias, *of_experts = self.gates
            gates = of_bias + torch.cat(of_experts, dim=1)
        found = (x, gates, self.up, self.up_bias, self.down, self.down_bias)
        return tuple(
            None if d is None or t is None else d.to(t.dtype)
            for d, t in zip(found, self.inputs, strict=True)
        )


def _weigh_(h: Tensor, gate: Tensor | None) -> Tensor:
    """Scale hidden units (I N, units) in place by gates (I, 1, experts, 1), unless None."""
    if gate is not None:
        _per_expert(h, gate).mul_(gate)
    return h


def _per_expert(h: Tensor, gate: Tensor) -> Tensor:
    """Return hidden units (I N, experts F), given (I, 1, experts, 1), as (I, N, experts, F)."""
    images, _, experts, _ = gate.shape
    return h.view(images, len(h) // max(images, 1), experts, h.shape[1] // experts)
