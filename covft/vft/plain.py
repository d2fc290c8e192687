"""Freeze, Full and BitFit: the methods that add nothing to the encoder."""

from __future__ import annotations

from torch import Tensor

from covft.models.vision.backbone import VisionBackbone
from covft.models.vision.tower import VisionTower
from covft.registry import VFT
from covft.vft.base import VFTMethod


class _PlainMethod(VFTMethod):
    """What the methods share that only choose which of the encoder's own parameters train."""

    def plain_state_dict(self, backbone: VisionBackbone) -> dict[str, Tensor]:
        """Return the encoder's own weights."""
        return backbone.state_dict()


@VFT.register_module()
class Freeze(_PlainMethod):
    """Leave the encoder as it is (LLaVA-1.5)."""

    def apply(self, tower: VisionTower) -> None:
        """Keep every parameter frozen."""
        tower.backbone.requires_grad_(False)


@VFT.register_module()
class Full(_PlainMethod):
    """Train every parameter of the blocks that the MLLM consumes (InternVL, Qwen-VL).

    The learning rate is the LLM's in the paper's benchmark, 2e-5.
    """

    def apply(self, tower: VisionTower) -> None:
        """Make every parameter trainable."""
        tower.backbone.requires_grad_(True)


@VFT.register_module()
class BitFit(_PlainMethod):
    """Train every bias of the encoder (Ben Zaken et al., ACL 2022).

    Those of the projections, the MLP and both norms of each block, of the patch convolution, the
    pre-norm and the final norm, where they exist. Biases added to all keys alike have no effect on
    attention, so their gradients are zero up to rounding. The learning rate, 1e-3, is the upper end
    of the original work's search (1e-4 to 1e-3 for BERT-large's biases).
    """

    learning_rate = 1e-3

    def apply(self, tower: VisionTower) -> None:
        """Make the parameters named ``bias`` trainable."""
        for name, parameter in tower.backbone.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[2] == "bias")
