"""Counting the matrix products of modules: forward, and what of the backward pass is needed.

A counter is written like its module's forward, on streams instead of tensors: how many rows one
has, and whether its gradient is asked for. A product of two factors costs 2 m k n operations
forward and as many again for each factor whose gradient is asked for; everything else (norms,
activations, softmax, the optimizer) isn't counted, as is usual.

Nothing is missed in silence: a module without a counter, or a parameter that no counter has named,
is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from covft.models.vision.vit import DropPath, LayerScale, QuickGELU


@dataclass(frozen=True)
class Flops:
    """Floating-point operations; a multiply-add is two.

    Attributes:
        forward: Of the forward pass.
        backward: Of the backward pass, without recomputation.
    """

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        """Both passes together."""
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, factor: float) -> Flops:
        return Flops(factor * self.forward, factor * self.backward)


@dataclass(frozen=True)
class Stream:
    """What stands for a tensor of tokens.

    Attributes:
        rows: Number of tokens.
        grad: Whether its gradient is needed: something trainable lies before it.
    """

    rows: float
    grad: bool

    def after(self, grad: bool) -> Stream:
        """Return the same tokens, their gradient needed also if ``grad``."""
        return replace(self, grad=self.grad or grad)


class Tally:
    """Sums of operations, and which parameters they have covered.

    Args:
        text_tokens: Context tokens K of an image's instruction, for modules that read them.
    """

    def __init__(self, *, text_tokens: int = 0) -> None:
        self._text_tokens = text_tokens
        #: Whether a counter has asked for the text's length.
        self.read_text = False
        self.forward = 0.0
        self.backward = 0.0
        self._counted: set[int] = set()

    @property
    def text_tokens(self) -> int:
        """Context tokens K of an image's instruction."""
        self.read_text = True
        return self._text_tokens

    @property
    def flops(self) -> Flops:
        """The sums so far."""
        return Flops(self.forward, self.backward)

    def uses(self, *parameters: Tensor | None) -> bool:
        """Note that these parameters are accounted for; return whether one of them trains."""
        found = [p for p in parameters if p is not None]
        self._counted.update(id(p) for p in found)
        return any(p.requires_grad for p in found)

    def product(self, rows: float, inner: float, cols: float, *, left: bool, right: bool) -> bool:
        """Count the product of a (rows, inner) and an (inner, cols) matrix.

        Args:
            rows: Rows of the left factor.
            inner: The dimension that is summed over.
            cols: Columns of the right factor.
            left: Whether the left factor's gradient is needed.
            right: Whether the right factor's is.

        Returns:
            Whether the product's gradient is needed.
        """
        flops = 2.0 * rows * inner * cols
        self.forward += flops
        self.backward += flops * (left + right)
        return left or right

    def attention(
        self, width: float, query: Stream, key: Stream, value: Stream, *, share: float = 1.0
    ) -> Stream:
        """Count scores and weighted values of an attention.

        Args:
            width: Width of all heads together.
            query: The queries.
            key: The keys.
            value: The values, as many as keys.
            share: Share of the pairs of query and key that count; a half where it is causal.
        """
        keys = share * key.rows
        scores = self.product(query.rows, width, keys, left=query.grad, right=key.grad)
        mixed = self.product(query.rows, keys, width, left=scores, right=value.grad)
        return Stream(query.rows, mixed)

    def check_complete(self, module: nn.Module, *, where: str) -> None:
        """Raise ValueError if a parameter of ``module`` isn't accounted for."""
        missed = [n for n, p in module.named_parameters() if id(p) not in self._counted]
        if missed:
            raise ValueError(
                f"{where}: no counter of operations knows the parameters {', '.join(missed[:5])}"
                f"{'' if len(missed) <= 5 else f' and {len(missed) - 5} more'}; complete the "
                "counter of the module they belong to (covft.engine.flops)"
            )


Counter = Callable[[Tally, Any, Stream], Stream]
_COUNTERS: dict[type, Counter] = {}
#: Methods that say what a module computes; ``run`` is a checkpointed block's.
_COMPUTING = ("forward", "run")


def counts(*kinds: type) -> Callable[[Counter], Counter]:
    """Register a counter ``(tally, module, x) -> output`` for classes of modules.

    A subclass is counted by it as long as it doesn't compute something of its own.
    """

    def register(counter: Counter) -> Counter:
        for kind in kinds:
            _COUNTERS[kind] = counter
        return counter

    return register


def count(tally: Tally, module: nn.Module, x: Stream) -> Stream:
    """Count a module.

    Raises:
        ValueError: If there is no counter for it.
    """
    # What shards modules (FSDP2) makes subclasses of theirs that compute the same.
    for kind in type(module).__mro__:
        if kind in _COUNTERS:
            return _COUNTERS[kind](tally, module, x)
        defines = any(name in kind.__dict__ for name in _COMPUTING)
        if defines and not _is_quantized_linear(module, kind):
            raise ValueError(
                f"no counter of operations for {kind.__module__}.{kind.__qualname__}; register one "
                "with covft.engine.flops.counts"
            )
    raise AssertionError(f"{type(module)} is no module with a forward")


def count_as(tally: Tally, kind: type, module: nn.Module, x: Stream) -> Stream:
    """Count a module as one of the class ``kind``, which it derives from."""
    return _COUNTERS[kind](tally, module, x)


def size(parameter: Tensor, dim: int) -> int:
    """Return a parameter's whole size in a dimension, also where ZeRO-3 has taken its values."""
    shape: Any = getattr(parameter, "ds_shape", parameter.shape)
    return int(shape[dim])


def _is_quantized_linear(module: nn.Module, kind: type) -> bool:
    return isinstance(module, nn.Linear) and kind.__module__.startswith("bitsandbytes")


@counts(nn.Identity, nn.GELU, nn.SiLU, nn.Dropout, QuickGELU, DropPath)
def _nothing(tally: Tally, module: nn.Module, x: Stream) -> Stream:
    return x


@counts(nn.LayerNorm, LayerScale)
def _elementwise(tally: Tally, module: nn.Module, x: Stream) -> Stream:
    return x.after(tally.uses(*module.parameters()))


@counts(nn.Sequential)
def _sequence(tally: Tally, module: nn.Sequential, x: Stream) -> Stream:
    for part in module:
        x = count(tally, part, x)
    return x


@counts(nn.Linear)
def _linear(tally: Tally, module: nn.Linear, x: Stream) -> Stream:
    grad = tally.product(
        x.rows,
        module.in_features,
        module.out_features,
        left=x.grad,
        right=tally.uses(module.weight),
    )
    return Stream(x.rows, grad | tally.uses(module.bias))


def low_rank(tally: Tally, module: Any, x: Stream) -> Stream:
    """Count the update ``B A x`` of a layer with ``lora_a`` (r, in) and ``lora_b`` (out, r)."""
    a, b = module.lora_a, module.lora_b
    rank = size(a, 0)
    inner = tally.product(x.rows, size(a, 1), rank, left=x.grad, right=tally.uses(a))
    return Stream(x.rows, tally.product(x.rows, rank, size(b, 0), left=inner, right=tally.uses(b)))
