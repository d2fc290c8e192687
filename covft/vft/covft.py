"""CoVFT: context-aware visual fine-tuning (CVPR 2026), sections 3.2 to 3.4.

From a block on, the FFN becomes a contextual mixture of experts (:class:`~covft.vft.comoe.CoMoE`),
routed per image by a context vector that contextual vector extraction
(:class:`~covft.vft.cve.CVE`) draws from the image's tokens and the instruction. Trained are the
CoMoE layers and the LayerNorms; all else stays frozen.
"""

from __future__ import annotations

from torch import nn

from covft.models.vision.tower import VisionTower
from covft.registry import VFT
from covft.vft.base import VFTMethod
from covft.vft.comoe import CoMoE


@VFT.register_module()
class CoVFT(VFTMethod):
    """Contextual mixture-of-experts in the later blocks, dense routing.

    Args:
        num_experts: Experts E of a layer.
        first_block: First block (0-based) with CoMoE; half of the consumed blocks by default.
        norms: "blocks" trains both norms of every consumed block (the public code), "all" every
            LayerNorm, the pre-norm included (the paper's wording).
        activation: Of the residual blocks: "quick_gelu" (the public code) or "gelu" (eq. 7).

    Raises:
        ValueError: If an option is unknown, or ``first_block`` isn't a consumed block.
    """

    needs_context = True

    def __init__(
        self,
        *,
        num_experts: int = 4,
        first_block: int | None = None,
        norms: str = "blocks",
        activation: str = "quick_gelu",
    ) -> None:
        if num_experts < 1:
            raise ValueError(f"vft.num_experts must be at least 1, got {num_experts}")
        if norms not in ("blocks", "all"):
            raise ValueError(f"vft.norms must be 'blocks' or 'all', got {norms!r}")
        self.num_experts, self.first_block = num_experts, first_block
        self.norms, self.activation = norms, activation

    def apply(self, tower: VisionTower) -> None:
        """Replace the FFNs from ``first_block`` on; train them and the LayerNorms."""
        backbone = tower.backbone
        backbone.requires_grad_(False)
        blocks = backbone.blocks
        first = len(blocks) // 2 if self.first_block is None else self.first_block
        if not 0 <= first < len(blocks):
            raise ValueError(
                f"vft.first_block is {first}, but the encoder consumes {len(blocks)} blocks"
            )
        if tower.context_dim is None:
            raise ValueError("CoVFT needs a text encoder; add model.text_encoder to the config")
        for index, block in enumerate(blocks):
            block.norm1.requires_grad_(True)
            block.norm2.requires_grad_(True)
            if index >= first:
                block.mlp = CoMoE(
                    block.mlp,
                    context_dim=tower.context_dim,
                    num_experts=self.num_experts,
                    activation=self.activation,
                )
        if self.norms == "all":
            for module in backbone.modules():
                if isinstance(module, nn.LayerNorm):
                    module.requires_grad_(True)
