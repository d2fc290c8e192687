"""The optimizer under DeepSpeed's ZeRO, with the interface of the other strategies' optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from covft.engine.optim_wrapper import AutocastOptimWrapper


class ZeROOptimWrapper(AutocastOptimWrapper):
    """Runs the steps through DeepSpeed's engine, which the strategy attaches after building this.

    ZeRO has emptied the optimizer's groups of parameters and put flat float32 partitions in their
    place. Names, learning rates and decay of the groups stay, and what is set there counts.
    The arguments are those of :class:`~covft.engine.AutocastOptimWrapper`.
    """

    #: DeepSpeed's engine. Nothing but ``learning_rates`` works without.
    engine: Any
    _stage: int

    def attach(self, engine: Any) -> None:
        """Use an engine that was built over this optimizer and its model."""
        self.engine = engine
        self._stage = int(engine.zero_optimization_stage())
        names = {name.split(".")[0]: None for name in self._trainable_names()}
        self._parts = list(names)
        self._waiting = False

    @contextmanager
    def micro_batch(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Tell the engine whether the optimizer steps after this micro-batch; it autocasts itself.

        Autocast would keep a copy of every weight that it casts to the end of the forward. Under
        ZeRO-3 that is the whole model, and not only the layer that is gathered.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        with torch.autocast(self.device_type, enabled=False, cache_enabled=self._stage < 3):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``, a scalar, to those of the partitions."""
        # The engine looks for the tensors to hang this on in tuples and dicts of a model's output,
        # and doesn't find those of a dataclass.
        loss.register_hook(lambda _: self.engine._backward_prologue())
        self.engine.backward(loss, scale_wrt_gas=False)
        self._waiting = True

    def clip_gradients(self) -> Tensor:
        """Return the gradients' norm, a scalar; :meth:`step` scales them to ``max_norm``."""
        squares = torch.zeros(len(self._parts), dtype=torch.float64, device=self.engine.device)
        for name, square in self._squared_norms():
            squares[self._parts.index(name.split(".")[0])] += square
        distributed.all_reduce(squares)
        norms = squares.sqrt()
        self._module_norms = dict(zip(self._parts, norms, strict=True))
        return torch.linalg.vector_norm(norms)

    def step(self, **kwargs: Any) -> None:
        """Clip and update; the gradients are gone after it."""
        self.engine.step()
        assert self.engine.was_step_applied(), "a non-finite gradient came to the step"
        self._waiting = False

    def zero_grad(self, **kwargs: Any) -> None:
        """Drop the gradients of a step that isn't to be done."""
        if not self._waiting:
            return
        zero = self.engine.optimizer
        zero.zero_grad()
        if zero_offloads(zero):
            zero.reset_cpu_buffers()
        if self._stage < 3:
            zero.micro_step_id = -1  # before the first: gradients replace what there was
        self._waiting = False

    def _trainable_names(self) -> Iterator[str]:
        for group in self.optimizer.param_groups:
            yield from group["param_names"]

    def _squared_norms(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names of parameters and the squared norm of what this process has of gradients."""
        zero, names = self.engine.optimizer, self.engine.param_names
        groups = zero.params_in_partition if self._stage < 3 else zero.fp16_groups
        for index, parameters in enumerate(groups):
            if zero_offloads(zero):
                norms = zero.norm_for_param_grads
                keys = [(parameter, zero.get_param_id(parameter)) for parameter in parameters]
                found = [(p, norms[key].double() ** 2) for p, key in keys if key in norms]
            else:
                gradients = [g for g in zero.averaged_gradients[index] if not _is_padding(g)]
                squares = [gradient.double().square().sum() for gradient in gradients]
                # Zeros that fill a partition up may follow, marked as padding or not.
                found = list(zip(parameters, squares, strict=False))
            yield from ((names[parameter], square) for parameter, square in found)


def zero_offloads(zero: Any) -> bool:
    """Return whether a ZeRO optimizer keeps its state on the CPU."""
    return bool(getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False))


def _is_padding(gradient: Tensor) -> bool:
    return getattr(gradient, "_zero_padding", False)
