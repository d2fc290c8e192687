"""Terms that modules inside the encoder add to the training loss, such as load balancing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class AuxiliaryLossModule(nn.Module):
    """A module whose forward adds a term to the loss.

    The forward computes the term on every training pass and hands it to :meth:`add_loss`, which
    keeps it only while :func:`collect_losses` is active. The recomputation under activation
    checkpointing, which comes after, so leaves nothing behind.
    """

    def __init__(self) -> None:
        super().__init__()
        self._collected: list[Tensor] | None = None

    def add_loss(self, loss: Tensor) -> None:
        """Add a scalar, already weighted, that is a mean over the images of the batch."""
        if self._collected is not None:
            self._collected.append(loss)


@contextmanager
def collect_losses(root: nn.Module) -> Iterator[list[Tensor]]:
    """Collect in a list what the modules under ``root`` add to the loss."""
    modules = [module for module in root.modules() if isinstance(module, AuxiliaryLossModule)]
    losses: list[Tensor] = []
    for module in modules:
        module._collected = losses
    try:
        yield losses
    finally:
        for module in modules:
            module._collected = None


@contextmanager
def collecting_paused(root: nn.Module) -> Iterator[None]:
    """Let the modules under ``root`` run without adding to the loss."""
    modules = [module for module in root.modules() if isinstance(module, AuxiliaryLossModule)]
    collected = [module._collected for module in modules]
    for module in modules:
        module._collected = None
    try:
        yield
    finally:
        for module, losses in zip(modules, collected, strict=True):
            module._collected = losses
