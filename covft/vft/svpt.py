"""SVPT: visual prompts that are shared across layers (Zhou et al., IEEE T-IP 34:4527, 2025).

"Sharing Task-Relevant Information in Visual Prompt Tuning by Cross-Layer Dynamic Connection"; an
earlier version is iVPT, arXiv 2404.05207. **This is a reconstruction from the abstract**: the parts
are those that it names, their formulas are ours (choices). On top of VPT-deep:

* Cross-layer dynamic connection with dynamic aggregation: block l reads the prompts
  ``Q_l = P_l + g_l Q_{l-1}``, with one gate for each image and prompt,
  ``g_l = tanh(LN(O_{l-1}) w_l + c_l)``; O_{l-1} are the outputs at the prompts of the block before.
  The first block reads its own prompts, Q_0 = P_0.
* Attentive enhancement: after block l, the most salient patches E_i get
  ``gamma_l sum_j softmax_j(<LN E_i, LN Q_lj> / sqrt(D)) Q_lj``. Salient are those to which CLS
  attends most in this block (mean over the heads; no gradient through the choice).

Further choices: LN has no affine parameters. Gates' weights and gamma start at zero, so SVPT starts
as VPT. Dropout is on P_l. Without a CLS token (SigLIP) the mean query of the patches attends. The
number of salient patches is rounded, and at least one. Learning rate, initial prompts and their
number are VPT's.

O and Q travel from block to block in the token sequence, between prefix and patches, so that
recomputing a block under activation checkpointing sees them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covft.models.vision.rope import rotate_patches
from covft.models.vision.tower import VisionTower
from covft.models.vision.vit import Block, Rope, ViTConfig
from covft.registry import VFT
from covft.vft.base import VFTMethod
from covft.vft.vpt import PromptedBlock, check_prompt_options


@VFT.register_module()
class SVPT(VFTMethod):
    """Prompts connected across the blocks, which enhance the salient patches.

    A reconstruction from the abstract; the module's text says what is ours.

    Args:
        num_prompts: Prompts of a block.
        dropout: Rate on the prompts in training.
        init: How prompts start: ``uniform`` or ``normal``, see :class:`~covft.vft.vpt.VPT`.
        top_ratio: Share of the patches that are enhanced.

    Raises:
        ValueError: If an option is out of range or unknown.
    """

    identity_at_init = False
    learning_rate = 1e-3

    def __init__(
        self,
        *,
        num_prompts: int = 50,
        dropout: float = 0.1,
        init: str = "uniform",
        top_ratio: float = 0.25,
    ) -> None:
        check_prompt_options(num_prompts=num_prompts, at_least=1, dropout=dropout, init=init)
        if not 0 < top_ratio <= 1:
            raise ValueError(f"vft.top_ratio must be in (0, 1], got {top_ratio}")
        self.num_prompts, self.dropout, self.init = num_prompts, dropout, init
        self.top_ratio = top_ratio

    def apply(self, tower: VisionTower) -> None:
        """Put a connected block in each block's place; prompts, gates and gammas train."""
        backbone = tower.backbone
        backbone.requires_grad_(False)
        last = len(backbone.blocks) - 1
        for index, block in enumerate(backbone.blocks):
            backbone.blocks[index] = ConnectedBlock(
                block,
                backbone.config,
                num_prompts=self.num_prompts,
                dropout=self.dropout,
                init=self.init,
                top_ratio=self.top_ratio,
                is_first=index == 0,
                is_last=index == last,
            )


class ConnectedBlock(PromptedBlock):
    """A block whose prompts build on those of the block before, and enhance the salient patches.

    It reads and returns ``[prefix, O, Q, patches]``, (I, P + 2 n + N, D): the outputs at the
    prompts, and the prompts, of the block before; then its own. The first one reads, and the last
    one returns, ``[prefix, patches]``.

    Args:
        block: The block whose place this takes.
        config: The encoder's architecture.
        num_prompts: Prompts n.
        dropout: Rate on the block's own prompts in training.
        init: How the prompts start.
        top_ratio: Share of the patches that are enhanced.
        is_first: Whether no block comes before.
        is_last: Whether no block comes after.
    """

    def __init__(
        self,
        block: Block,
        config: ViTConfig,
        *,
        num_prompts: int,
        dropout: float,
        init: str,
        top_ratio: float,
        is_first: bool,
        is_last: bool,
    ) -> None:
        super().__init__(block, config, num_prompts=num_prompts, dropout=dropout, init=init)
        self.is_last, self.has_cls = is_last, config.use_cls
        self.num_salient = max(1, round(top_ratio * self.num_patches))
        self.gate: nn.Linear | None = None
        if not is_first:
            # Draws no random numbers, so that a seed gives VPT's prompts.
            self.gate = nn.utils.skip_init(
                nn.Linear,
                config.hidden_dim,
                1,
                dtype=self.prompts.dtype,
                device=self.prompts.device,
            )
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)
        self.gamma = nn.Parameter(self.prompts.new_zeros(1))

    def run(self, x: Tensor, context: Any, rope: Rope | None = None) -> Tensor:
        """Connect the prompts, run the block, and enhance the salient patches.

        Args:
            x: Tokens, see the class.
            context: Handed to the block.
            rope: Handed to the block; it is for the last N tokens.

        Returns:
            Tokens, see the class.
        """
        prompts = self.own_prompts(x)
        if self.gate is None:
            prefix, patches = x.split((self.num_prefix, self.num_patches), dim=1)
        else:
            count = len(self.prompts)
            prefix, outputs, before, patches = x.split(
                (self.num_prefix, count, count, self.num_patches), dim=1
            )
            prompts = prompts + torch.tanh(self.gate(_normalised(outputs))).to(x.dtype) * before
        tokens = torch.cat((prefix, prompts, patches), dim=1)
        salient = self._salient(tokens, rope)
        prefix, outputs, patches = self.parts(self.block(tokens, context, rope))
        patches = patches + self.gamma.to(x.dtype) * salient * _read(patches, prompts)
        carried = () if self.is_last else (outputs, prompts)
        return torch.cat((prefix, *carried, patches), dim=1)

    @torch.no_grad()
    def _salient(self, tokens: Tensor, rope: Rope | None) -> Tensor:
        """Return (I, N, 1) with 1 at the patches that the block attends to most, 0 elsewhere."""
        attention = self.block.attn
        normalised = self.block.norm1(tokens)
        readers = normalised[:, :1] if self.has_cls else normalised[:, -self.num_patches :]
        query, key = (
            projection(part).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for projection, part in ((attention.q_proj, readers), (attention.k_proj, normalised))
        )
        if rope is not None:
            key = rotate_patches(key, *rope)
            query = query if self.has_cls else rotate_patches(query, *rope)
        query = query.mean(2, keepdim=True) / math.sqrt(query.shape[-1])
        weights = (query @ key.transpose(-1, -2)).softmax(-1).mean(1)[:, 0, -self.num_patches :]
        best = weights.topk(self.num_salient, dim=-1).indices
        salient = torch.zeros_like(weights, dtype=tokens.dtype)
        return salient.scatter_(-1, best, 1.0).unsqueeze(-1)


def _read(patches: Tensor, prompts: Tensor) -> Tensor:
    """Return what each of the patches (I, N, D) reads from the prompts (I, n, D) by similarity."""
    scores = _normalised(patches) @ _normalised(prompts).transpose(1, 2)
    read = (scores / math.sqrt(patches.shape[-1])).softmax(-1).to(prompts.dtype) @ prompts
    return read.to(patches.dtype)


def _normalised(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])
