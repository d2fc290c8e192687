"""VPT-deep: learned prompt tokens at every block (Jia et al., ECCV 2022, section 3.2).

Each block reads ``[prefix, prompts, patches]``, with prompts of its own; their outputs are thrown
away. The encoder stays frozen.

Choices and deviations:

* The prompts follow all prefix tokens, registers too; the original has CLS only. As all tokens
  attend to all, the order matters only to rotary positions, which belong to the last N tokens.
* ``init="uniform"`` is the original's, U(-v, v) with v = sqrt(6 / (3 p^2 + D)) for patch size p;
  ``"normal"``, N(0, 1), is that of CoVFT's public code.
* 50 prompts a block, and dropout 0.1 as in the commands that the original publishes (its code's
  default is 0).
* The learning rate, 1e-3, is for AdamW. The original searches rates for SGD, which don't carry
  over.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from covft.models.checkpointing import CheckpointedBlock
from covft.models.vision.tower import VisionTower
from covft.models.vision.vit import Block, Rope, ViTConfig
from covft.registry import VFT
from covft.vft.base import VFTMethod

#: How prompts start; the first by default.
INITS = ("uniform", "normal")
#: Dropout rate on the prompts by default.
DROPOUT = 0.1


@VFT.register_module()
class VPT(VFTMethod):
    """Visual prompt tuning, deep: own prompts for every consumed block.

    Args:
        num_prompts: Prompts of a block; 0 leaves the encoder as it is, with nothing to train, and
            no other options.
        dropout: Rate on the prompts in training.
        init: ``uniform`` or ``normal``, see above.

    Raises:
        ValueError: If an option is out of range or unknown, or would have no effect.
    """

    identity_at_init = False
    learning_rate = 1e-3

    def __init__(
        self, *, num_prompts: int = 50, dropout: float = DROPOUT, init: str = INITS[0]
    ) -> None:
        check_prompt_options(num_prompts=num_prompts, at_least=0, dropout=dropout, init=init)
        if num_prompts == 0 and (dropout, init) != (DROPOUT, INITS[0]):
            raise ValueError(
                f"vft.dropout={dropout} and vft.init={init!r} have no effect with num_prompts=0: "
                "remove them, or give num_prompts"
            )
        self.num_prompts, self.dropout, self.init = num_prompts, dropout, init

    def apply(self, tower: VisionTower) -> None:
        """Put a prompted block in each block's place; only prompts train."""
        backbone = tower.backbone
        backbone.requires_grad_(False)
        if self.num_prompts == 0:
            return
        for index, block in enumerate(backbone.blocks):
            backbone.blocks[index] = PromptedBlock(
                block,
                backbone.config,
                num_prompts=self.num_prompts,
                dropout=self.dropout,
                init=self.init,
            )


class PromptedBlock(CheckpointedBlock):
    """A block that reads prompts beside its tokens.

    Args:
        block: The block whose place this takes.
        config: The encoder's architecture.
        num_prompts: Prompts n.
        dropout: Rate on the prompts in training, drawn anew for each image.
        init: How the prompts start, see :class:`VPT`.
    """

    def __init__(
        self, block: Block, config: ViTConfig, *, num_prompts: int, dropout: float, init: str
    ) -> None:
        super().__init__()
        self.block = block
        self.num_prefix = config.num_prefix
        self.num_patches = config.grid**2
        self.prompts = nn.Parameter(block.norm1.weight.new_empty(num_prompts, config.hidden_dim))
        self.dropout = nn.Dropout(dropout)
        if init == "uniform":
            bound = math.sqrt(6 / (3 * config.patch_size**2 + config.hidden_dim))
            nn.init.uniform_(self.prompts, -bound, bound)
        else:
            nn.init.normal_(self.prompts)

    def run(self, x: Tensor, context: Any, rope: Rope | None = None) -> Tensor:
        """Run the block on the tokens and the prompts, and drop the prompts' outputs.

        Args:
            x: Tokens, (I, T, D).
            context: Handed to the block.
            rope: Handed to the block; it is for the last N tokens.

        Returns:
            (I, T, D).
        """
        prefix, patches = x.split((self.num_prefix, self.num_patches), dim=1)
        tokens = torch.cat((prefix, self.own_prompts(x), patches), dim=1)
        prefix, _, patches = self.parts(self.block(tokens, context, rope))
        return torch.cat((prefix, patches), dim=1)

    def own_prompts(self, x: Tensor) -> Tensor:
        """Return this block's prompts for the images of ``x``, (I, n, D)."""
        return self.dropout(self.prompts.expand(len(x), -1, -1)).to(x.dtype)

    def parts(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split (I, P + n + N, D) into prefix, prompts and patches."""
        prefix, prompts, patches = tokens.split(
            (self.num_prefix, len(self.prompts), self.num_patches), dim=1
        )
        return prefix, prompts, patches


def check_prompt_options(*, num_prompts: int, at_least: int, dropout: float, init: str) -> None:
    """Check what the prompt methods have in common.

    Raises:
        ValueError: If an option is out of range or unknown.
    """
    if num_prompts < at_least:
        raise ValueError(f"vft.num_prompts must be at least {at_least}, got {num_prompts}")
    if not 0 <= dropout < 1:
        raise ValueError(f"vft.dropout must be in [0, 1), got {dropout}")
    if init not in INITS:
        raise ValueError(f"vft.init must be {' or '.join(map(repr, INITS))}, got {init!r}")
