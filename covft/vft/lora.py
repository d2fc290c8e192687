"""LoRA: low-rank updates of frozen projections (Hu et al., ICLR 2022, section 4.1).

A frozen projection ``W x + b`` becomes ``W x + b + (alpha / r) B A dropout(x)``. A is drawn as a
linear layer's weight, B starts at zero, so the encoder starts unchanged.

Choices:

* The query, key, value and output projections of every consumed block are adapted; Hu et al. find
  all four at a low rank as good as fewer at a higher one (section 7.1), for language models.
* Rank 8, alpha 16, dropout 0.05, and the learning rate 2e-4: Hu et al. use 2e-4 for GPT-2 and GPT-3
  (appendix D), and LLaVA-1.5 uses it for its LLM's LoRA. No source gives one for this encoder.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from covft.models.low_rank import check_low_rank, merge_update, zero_update
from covft.models.vision.backbone import VisionBackbone
from covft.models.vision.tower import VisionTower
from covft.registry import VFT
from covft.vft.base import VFTMethod

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


@VFT.register_module()
class LoRA(VFTMethod):
    """Low-rank updates of every attention projection; all else stays frozen.

    Args:
        rank: Rank r of the updates.
        alpha: Updates are scaled by alpha / r.
        dropout: Rate on the updates' inputs in training.

    Raises:
        ValueError: If an option is out of range.
    """

    learning_rate = 2e-4

    def __init__(self, *, rank: int = 8, alpha: float = 16.0, dropout: float = 0.05) -> None:
        check_low_rank(rank, alpha, dropout, where="vft")
        self.rank, self.alpha, self.dropout = rank, alpha, dropout

    def apply(self, tower: VisionTower) -> None:
        """Wrap the projections; only the updates train."""
        tower.backbone.requires_grad_(False)
        for block in tower.backbone.blocks:
            for name in PROJECTIONS:
                adapted = LoRALinear(
                    getattr(block.attn, name),
                    rank=self.rank,
                    alpha=self.alpha,
                    dropout=self.dropout,
                )
                setattr(block.attn, name, adapted)

    def plain_state_dict(self, backbone: VisionBackbone) -> dict[str, Tensor]:
        """Return the encoder's weights with the updates merged in, under the plain names."""
        adapted = {
            name: module
            for name, module in backbone.named_modules()
            if isinstance(module, LoRALinear)
        }
        plain: dict[str, Tensor] = {}
        for name, value in backbone.state_dict().items():
            owner, _, leaf = name.rpartition(".")
            wrapper, _, _ = owner.rpartition(".")
            if owner in adapted:
                continue  # an update: it is part of the merged weight
            if wrapper not in adapted:
                plain[name] = value
            else:
                plain[f"{wrapper}.{leaf}"] = (
                    adapted[wrapper].merged_weight() if leaf == "weight" else value
                )
        return plain


class LoRALinear(nn.Module):
    """A frozen linear layer and a low-rank update of its weight.

    Args:
        base: The layer; it is frozen.
        rank: Rank r of the update.
        alpha: The update is scaled by alpha / r.
        dropout: Rate on the update's input in training.
    """

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a, self.lora_b = zero_update(
            base.in_features,
            base.out_features,
            rank=rank,
            dtype=base.weight.dtype,
            device=base.weight.device,
        )
        self.dropout = nn.Dropout(dropout)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """Project (..., in_features) to (..., out_features)."""
        update = F.linear(F.linear(self.dropout(x), self.lora_a), self.lora_b)
        return self.base(x) + self.scale * update

    def merged_weight(self) -> Tensor:
        """Return W + (alpha / r) B A, (out_features, in_features), in the type of W."""
        weight = self.base.weight
        return merge_update(weight, self.lora_a, self.lora_b, scale=self.scale, dtype=weight.dtype)

    def extra_repr(self) -> str:
        """Show rank and scale in the printed model."""
        return f"rank={self.lora_a.shape[0]}, scale={self.scale:g}"
