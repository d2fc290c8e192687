"""QA-ViT: question-aware vision transformer (Ganz et al., CVPR 2024, sections 3.1 and 3.2).

In the later blocks the question's tokens join the keys and values of the frozen self-attention, and
a trained, gated output projection runs beside the frozen one. The image tokens alone ask and go on;
each block projects the text anew.

Deviations from the public code (amazon-science/QA-ViT):

* Padded text tokens are masked; there they enter the softmax.
* The frozen query projection isn't computed for the text, whose queries the code throws away.

Choices that the sources leave open:

* At most ``max_text_tokens`` text tokens, the first real ones, special tokens included.
* Text keys have no place in the image, so an encoder's rotary positions don't turn them.
* The text's projections start as library defaults.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covft.models.text_encoder import Context
from covft.models.vision.backbone import VisionBackbone
from covft.models.vision.rope import rotate_patches
from covft.models.vision.tower import VisionTower
from covft.models.vision.vit import Attention, Rope, attend
from covft.registry import VFT
from covft.vft.base import VFTMethod, check_context


@VFT.register_module(name=["QAViT", "QA-ViT"])
class QAViT(VFTMethod):
    """Question tokens among the keys and values of the later blocks' frozen self-attention.

    The features differ from the frozen encoder's from the start: the text enters the softmax at
    once, by design. The learning rate is the original's, 1e-4 with AdamW.

    Args:
        first_block: First block (0-based) that reads the question; by default half of the published
            encoder's depth ("late" fusion): blocks 12..22 of CLIP-L read at its next-to-last layer.
        max_text_tokens: Text tokens read at most; later ones are left out.

    Raises:
        ValueError: If ``max_text_tokens`` isn't positive.
    """

    needs_context = True
    identity_at_init = False
    learning_rate = 1e-4

    def __init__(self, *, first_block: int | None = None, max_text_tokens: int = 64) -> None:
        if max_text_tokens < 1:
            raise ValueError(f"vft.max_text_tokens must be at least 1, got {max_text_tokens}")
        self.first_block, self.max_text_tokens = first_block, max_text_tokens

    def apply(self, tower: VisionTower) -> None:
        """Replace the attention from ``first_block`` on; train what the replacement adds.

        Raises:
            ValueError: If ``first_block`` isn't a consumed block, or there is no text encoder.
        """
        backbone = tower.backbone
        backbone.requires_grad_(False)
        first = self.context_free_blocks(backbone)
        if not 0 <= first < len(backbone.blocks):
            raise ValueError(
                f"vft.first_block is {first}, but the encoder consumes {len(backbone.blocks)} "
                "blocks; choose one of them (default: half of the published encoder's depth)"
            )
        if tower.context_dim is None:
            raise ValueError("QAViT needs a text encoder; add model.text_encoder to the config")
        for block in backbone.blocks[first:]:
            block.attn = QuestionAwareAttention(
                block.attn, context_dim=tower.context_dim, max_text_tokens=self.max_text_tokens
            )

    def context_free_blocks(self, backbone: VisionBackbone) -> int:
        """Return the index of the first block that reads the question."""
        return backbone.config.depth // 2 if self.first_block is None else self.first_block


class QuestionAwareAttention(nn.Module):
    """Frozen self-attention whose keys and values begin with the question's tokens.

    The frozen projections keep their names. Trained are ``text_proj`` (LayerNorm, W_1, GELU, W_2),
    ``gated_proj`` (W_g, b_g: a copy of the output projection) and its gate ``beta``.

    Args:
        attn: The pretrained attention, frozen.
        context_dim: Width C of the context.
        max_text_tokens: Text tokens read at most.
    """

    def __init__(self, attn: Attention, *, context_dim: int, max_text_tokens: int) -> None:
        super().__init__()
        self.num_heads, self.max_text_tokens = attn.num_heads, max_text_tokens
        self.q_proj, self.k_proj, self.v_proj = attn.q_proj, attn.k_proj, attn.v_proj
        self.out_proj = attn.out_proj
        width = attn.out_proj.out_features
        self.text_proj = nn.Sequential(
            nn.LayerNorm(context_dim),
            nn.Linear(context_dim, width, bias=False),
            nn.GELU(),
            nn.Linear(width, width, bias=False),
        ).to(attn.out_proj.weight)
        self.gated_proj = copy.deepcopy(attn.out_proj).requires_grad_(True)
        self.beta = nn.Parameter(attn.out_proj.weight.new_zeros(1))

    def forward(self, x: Tensor, context: Context | None, rope: Rope | None = None) -> Tensor:
        """Let the image tokens attend to the question and to themselves, in one softmax.

        Args:
            x: Normalised tokens, (I, T, D).
            context: ``tokens`` (I, K, C) and ``mask`` (I, K) of each image's instruction. An image
                whose text is all padding attends to itself alone.
            rope: Cosines and sines for the last N tokens, each (N, D / heads).

        Returns:
            ``W_o A + b_o + tanh(beta) (W_g A + b_g)``, (I, T, D).

        Raises:
            ValueError: If there is no context, or not one row per image.
        """
        tokens, text_mask = self._first_real(
            check_context(context, len(x), reader="QAViT's attention")
        )
        text = self.text_proj(tokens.to(x.dtype))
        both = torch.cat((text, x), dim=1)  # the text first: rope belongs to the last N keys
        query, key, value = (
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for states in (self.q_proj(x), self.k_proj(both), self.v_proj(both))
        )
        if rope is not None:
            query, key = rotate_patches(query, *rope), rotate_patches(key, *rope)
        mask = F.pad(text_mask, (0, x.shape[1]), value=True)[:, None, None]
        mixed = attend(query, key, value, mask)
        return self.out_proj(mixed) + self.beta.tanh() * self.gated_proj(mixed)

    def _first_real(self, context: Context) -> tuple[Tensor, Tensor]:
        """Return the first real tokens of each text and their mask, at most ``max_text_tokens``."""
        if context.mask.shape[1] <= self.max_text_tokens:
            return context.tokens, context.mask
        # Sorted, because some tokenizers pad on the left; attention doesn't mind the keys' order.
        order = (~context.mask).long().argsort(dim=1, stable=True)[:, : self.max_text_tokens]
        index = order.unsqueeze(-1).expand(-1, -1, context.tokens.shape[-1])
        return context.tokens.gather(1, index), context.mask.gather(1, order)
