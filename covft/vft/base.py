"""What a visual fine-tuning (VFT) method is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from covft.models.vision.tower import VisionTower


class VFTMethod(ABC):
    """A way to fine-tune a vision encoder.

    A method edits the built and loaded encoder: it decides what trains (``requires_grad``),
    replaces submodules of blocks, and may bring a connector between encoder and projector.
    Whatever it puts into a block gets the context as an argument: ``mlp(x, context)``,
    ``attn(x, context, rope)``.
    """

    #: Whether the method's modules read the context; the text encoder is built only if so.
    needs_context: bool = False

    @abstractmethod
    def apply(self, tower: VisionTower) -> nn.Module | None:
        """Edit ``tower`` in place, starting from a frozen encoder.

        Returns:
            A connector, called as ``connector(features, context)`` on (I, N, D), or None.
        """
