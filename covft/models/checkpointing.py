"""Activation checkpointing: which blocks compute their activations again in the backward pass.

The policies, as an encoder's and an LLM's ``checkpointing`` take them:

* False or "none": every block keeps what its backward pass needs.
* True or "full": a block keeps its input alone and runs again, at the cost of a third more compute.
* "selective": a block keeps the outputs of its matrix products and of attention, and computes the
  rest again (norms, activations, rotations): little compute, about half the memory. (Korthikanti et
  al., MLSys 2023, choose by cost, too, but recompute attention, which flash kernels made cheap to
  keep.)
* a share in (0, 1): that share of the blocks, evenly spread, is "full", the others "none".
* ``dict(budget_gb=8)``: as few blocks are "full" as let all of them together keep at most 8 * 10^9
  bytes. What a block keeps for a token is measured in the first forward with gradients, by running
  each block once more on its real input; how many are recomputed is then decided anew in every
  forward, by its tokens. Under autocast a float32 block's weights are kept in the lower precision,
  too, and are part of what is measured.

A CoMoE layer's own ``recompute`` is part of what its block does: under "full" it has no effect that
matters, beside "selective" it is refused, for it computes again what that policy keeps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from covft.models.eager import running_eagerly
from covft.registry import nearest

#: How one block is run: None keeps all activations, "eager" is "full" without compiled code.
Mode = Literal["full", "selective", "eager"] | None
#: What a config may say; a mapping is ``dict(budget_gb=...)``.
Setting = bool | str | float | Mapping[str, float]

_NAMES: dict[str, Mode] = {"none": None, "full": "full", "selective": "selective"}

_aten = torch.ops.aten
_KEPT_OPS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
}
#: Libraries whose operators are attention: PyTorch's varlen_attn, flash-attn's, and our own.
_KEPT_NAMESPACES = ("torch_attn", "flash_attn", "flash_attn_2", "flash_attn_3", "covft")


def _kept_or_recomputed(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op in _KEPT_OPS or getattr(op, "namespace", None) in _KEPT_NAMESPACES:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _also_eagerly() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return what surrounds the first run of a function that runs eagerly, and the second."""
    return nullcontext(), running_eagerly()


#: Run a function under a mode, called as ``RUN[mode](function, *args)``: shared objects, so that
#: compiled blocks with the same mode share their code.
RUN: dict[Mode, Callable[..., Any]] = {
    "full": partial(checkpoint, use_reentrant=False),
    "selective": partial(
        checkpoint,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, _kept_or_recomputed),
    ),
    "eager": partial(checkpoint, use_reentrant=False, context_fn=_also_eagerly),
}


class CheckpointedBlock(nn.Module):
    """A block that recomputes its own activations; subclasses compute in :meth:`run`.

    The block does so inside its forward, so that hooks of distributed engines stay outside, and so
    that a compiled block sees, and compiles, the recomputation.
    """

    def __init__(self) -> None:
        super().__init__()
        #: Set before each forward by what owns the blocks.
        self.mode: Mode = None

    def forward(self, *args: Any) -> Any:
        """Run the block; arguments and result are those of :meth:`run`."""
        if self.mode is None or not (self.training and torch.is_grad_enabled()):
            return self.run(*args)
        return RUN[self.mode](self.run, *args)

    def run(self, *args: Any) -> Any:
        """Compute the output."""
        raise NotImplementedError


class CheckpointingPolicy:
    """One of the policies above, for the blocks of one stack.

    Args:
        setting: What the config says.
        where: Its key, for error messages.

    Raises:
        ValueError: If it is none of the policies.
    """

    def __init__(self, setting: Setting, *, where: str) -> None:
        self.where = where
        self.setting = _checked(setting, where)
        #: Bytes that each block keeps for a token, and those of its input alone; None: unknown yet.
        self._per_token: list[tuple[float, float]] | None = None
        self._warned = False

    def __bool__(self) -> bool:
        """Tell whether anything may be recomputed."""
        return self.setting is not False

    @contextmanager
    def modes(self, blocks: Sequence[nn.Module], x: Tensor) -> Iterator[list[Mode]]:
        """Decide how each block is run in the forward that the context surrounds.

        Args:
            blocks: All blocks of the stack, in their order.
            x: What the first one gets, (…, D): its tokens count.

        Raises:
            ValueError: If the policy can't be had with these blocks.
        """
        if isinstance(self.setting, Mapping):
            if self._per_token is None and x.numel() > 0:
                with _measured(blocks, tokens=_tokens(x)) as measured:
                    yield ["eager"] * len(blocks)
                # A forward that skipped blocks tells nothing of those.
                if len(measured) == len(blocks):
                    self._per_token = [measured[index] for index in range(len(blocks))]
                return
            yield self._within_budget(len(blocks), _tokens(x))
        elif isinstance(self.setting, float):
            yield self._share(self.setting, len(blocks))
        else:
            mode = "full" if self.setting is True else _NAMES[self.setting or "none"]
            if mode == "selective":
                self._check_selective(blocks)
            yield [mode] * len(blocks)

    @contextmanager
    def applied_to_transformers(self, layers: Sequence[Any], x: Tensor) -> Iterator[None]:
        """Let transformers' layers follow the policy in the forward that the context surrounds.

        Args:
            layers: All ``GradientCheckpointingLayer`` of the model, in their order.
            x: What the first one gets, (…, D).
        """
        # The layers' own switches are set, one by one: a forward overridden on an instance would
        # bypass them, and gradient_checkpointing_enable knows one function for all layers.
        active = torch.is_grad_enabled() and all(layer.training for layer in layers)
        with self.modes(layers, x) if active else nullcontext() as modes:
            for layer, mode in zip(layers, modes or [None] * len(layers), strict=True):
                layer.gradient_checkpointing = mode is not None
                if mode is not None:
                    layer._gradient_checkpointing_func = RUN[mode]
            yield

    def _share(self, share: float, blocks: int) -> list[Mode]:
        count = round(share * blocks)
        if not 0 < count < blocks:
            raise ValueError(
                f"{self.where}={share} recomputes {count} of {blocks} blocks; use "
                f"{count > 0}, or a share of at least {0.5 / blocks:.3f} and below "
                f"{1 - 0.5 / blocks:.3f}"
            )
        chosen = ((n + 1) * count // blocks > n * count // blocks for n in range(blocks))
        return ["full" if recomputed else None for recomputed in chosen]

    def _within_budget(self, blocks: int, tokens: int) -> list[Mode]:
        assert isinstance(self.setting, Mapping)
        modes: list[Mode] = ["full"] * blocks
        if self._per_token is None:
            return modes
        left = self.setting["budget_gb"] * 1e9 - tokens * sum(i for _, i in self._per_token)
        if left < 0 and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.where}: {tokens} tokens take {-left / 1e9:.2f} GB more than the budget of "
                f"{self.setting['budget_gb']} GB although every block is recomputed; make "
                "train_dataloader.batch_size smaller, or the budget larger",
                stacklevel=4,
            )
        # The cheapest are kept first, which keeps the most; of equals the last, for what those keep
        # is free again by the time that others run a second time.
        extra = {n: tokens * (kept - own) for n, (kept, own) in enumerate(self._per_token)}
        for index in sorted(extra, key=lambda n: (extra[n], -n)):
            left -= extra[index]
            if left < 0:
                break
            modes[index] = None
        return modes

    def _check_selective(self, blocks: Iterable[nn.Module]) -> None:
        for block in blocks:
            if any(getattr(module, "recompute", False) is True for module in block.modules()):
                raise ValueError(
                    f"{self.where}='selective' keeps what vft.recompute=True computes again; use "
                    f"{self.where}=True, or vft.recompute=False"
                )


def _checked(setting: Any, where: str) -> Setting:
    """Return a setting in one form: False for "none", True for "full", numbers as float."""
    if isinstance(setting, bool):
        return setting
    if isinstance(setting, str):
        if setting not in _NAMES:
            raise ValueError(f"{where}='{setting}' is unknown; {nearest(setting, _NAMES)}")
        return {"none": False, "full": True}.get(setting, setting)
    if isinstance(setting, Mapping):
        budget = setting.get("budget_gb")
        valid = isinstance(budget, (int, float)) and 0 < budget < math.inf
        if len(setting) != 1 or not valid or isinstance(budget, bool):
            raise ValueError(
                f"{where} as a dict must be dict(budget_gb=...) above 0, got {dict(setting)}"
            )
        return dict(setting)
    if isinstance(setting, (int, float)) and 0 < setting < 1:
        return float(setting)
    raise ValueError(
        f"{where} must be False, True, 'none', 'full', 'selective', a share of the blocks between "
        f"0 and 1, or dict(budget_gb=...), got {setting!r}"
    )


@contextmanager
def _measured(
    blocks: Sequence[nn.Module], *, tokens: int
) -> Iterator[dict[int, tuple[float, float]]]:
    """Measure in passing what the blocks keep for a token; see ``_per_token``."""
    found: dict[int, tuple[float, float]] = {}

    def measure(index: int, block: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        kept = _probe(block, args, kwargs)
        found[index] = (kept / tokens, min(args[0].nbytes, kept) / tokens)

    handles = [
        block.register_forward_pre_hook(partial(measure, index), with_kwargs=True)
        for index, block in enumerate(blocks)
    ]
    try:
        with running_eagerly():  # a compiled block would compile the hook
            yield found
    finally:
        for handle in handles:
            handle.remove()


def _probe(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Run a block for its bytes alone: without recomputation, and without a trace of the run."""
    # Not above: the encoders import this module.
    from covft.models.vision.auxiliary_loss import collecting_paused

    # The class's own forward: the instance's may be compiled, and would recompute.
    forward = block.run if isinstance(block, CheckpointedBlock) else _plain_forward(block)
    devices = [args[0].device] if args[0].is_cuda else []
    with torch.random.fork_rng(devices), collecting_paused(block):
        return saved_bytes(
            lambda: forward(*args, **kwargs), excluded=[*block.parameters(), *block.buffers()]
        )


def _plain_forward(block: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        before = getattr(block, "gradient_checkpointing", None)
        if before is not None:
            block.gradient_checkpointing = False
        try:
            return type(block).forward(block, *args, **kwargs)
        finally:
            if before is not None:
                block.gradient_checkpointing = before

    return forward


def saved_bytes(forward: Callable[[], object], *, excluded: Iterable[Tensor] = ()) -> int:
    """Return how many bytes a forward pass keeps for the backward pass.

    Counted is the whole storage of every tensor that autograd saves, each storage once, whoever
    else holds it: inputs of ``forward`` and views count like any other. Not counted is what a
    saved tensor's graph holds by other means, such as the gradient buffers.

    Args:
        forward: Runs the forward pass and returns its result.
        excluded: Tensors whose storages aren't counted, such as parameters.
    """
    ignored = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            storages[storage.data_ptr()] = storage  # held, so that no other takes its address
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(storage.nbytes() for storage in storages.values())
    del result
    return total


def _tokens(x: Tensor) -> int:
    return x.numel() // x.shape[-1]
