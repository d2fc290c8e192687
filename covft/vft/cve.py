"""Contextual vector extraction (CoVFT, section 3.3).

Deliberate deviations, each without effect on outputs or gradients:

* The text half of the key projection and the key bias add the same number to every token's score,
  which softmax removes. They hold no parameters here, only buffers, so that the public
  checkpoints' layout can be read and written.
* With one query per image the key projection is folded into the query, and values are projected
  after pooling: no keys or values of all tokens are formed.
* The residual blocks keep less for the backward pass than plain autograd would
  (:mod:`covft.vft.gated_ffn`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covft.models.vision.vit import activation
from covft.vft.gated_ffn import act_name, gated_ffn


class CVE(nn.Module):
    """Contextual vector extraction: the refined text attends over the refined image (eq. 7-8).

    Args:
        width: Width D of the image tokens.
        context_dim: Width C of text and context vector.
        num_heads: Attention heads.
        activation: Of the residual blocks.
        recompute: Redo the residual blocks' up-projections in the backward pass instead of keeping
            their outputs.
    """

    k_proj_text: Tensor
    k_bias: Tensor

    def __init__(
        self,
        width: int,
        context_dim: int,
        *,
        num_heads: int = 4,
        activation: str = "quick_gelu",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if context_dim % num_heads:
            raise ValueError(
                f"CVE's {num_heads} heads don't divide the context's width {context_dim}, that of "
                "model.text_encoder; choose another text encoder, or a vft.context other than 'cve'"
            )
        self.width, self.num_heads = width, num_heads
        self.image_resblock = ResidualBlock(width, activation, recompute=recompute)
        self.text_resblock = ResidualBlock(context_dim, activation, recompute=recompute)
        self._init_attention(width, context_dim)
        self.out_proj = nn.Linear(context_dim, context_dim)
        nn.init.zeros_(self.out_proj.bias)

    def _init_attention(self, width: int, dim: int) -> None:
        # Xavier over the whole key and value matrices, as nn.MultiheadAttention draws them.
        key, value = torch.empty(dim, width + dim), torch.empty(dim, width + dim)
        self.q_proj = nn.Parameter(nn.init.xavier_uniform_(torch.empty(dim, dim)))
        nn.init.xavier_uniform_(key)
        self.k_proj = nn.Parameter(key[:, :width].clone())
        self.register_buffer("k_proj_text", key[:, width:].clone())
        self.v_proj = nn.Parameter(nn.init.xavier_uniform_(value))
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("k_bias", torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        """Return the context vectors (I, C) of images with (I, N, D) tokens and (I, C) texts."""
        image, text = self.image_resblock(tokens), self.text_resblock(text.to(tokens.dtype))
        heads = (self.num_heads, -1)
        query = F.linear(text, self.q_proj, self.q_bias).unflatten(-1, heads)  # (I, h, c)
        query = torch.einsum("ihc,hcd->ihd", query, self.k_proj.unflatten(0, heads))
        scale = 1 / math.sqrt(self.q_proj.shape[0] // self.num_heads)
        weights = torch.softmax(query @ image.transpose(1, 2) * scale, dim=-1)  # (I, h, N)
        pooled = weights @ image  # (I, h, D)
        value = self.v_proj[:, : self.width].unflatten(0, heads)
        attended = torch.einsum("ihd,hcd->ihc", pooled, value).flatten(1)
        attended = attended + F.linear(text, self.v_proj[:, self.width :], self.v_bias)
        return self.out_proj(attended)

    def public_state_dict(self) -> dict[str, Tensor]:
        """Return the weights in the layout of ``nn.MultiheadAttention`` over [image, text] keys."""
        state = {
            "cross_attn.q_proj_weight": self.q_proj,
            "cross_attn.k_proj_weight": torch.cat([self.k_proj, self.k_proj_text], dim=1),
            "cross_attn.v_proj_weight": self.v_proj,
            "cross_attn.in_proj_bias": torch.cat([self.q_bias, self.k_bias, self.v_bias]),
        }
        for name in ("image_resblock", "text_resblock"):
            for key, value in getattr(self, name).named_parameters():
                state[f"{name}.{key}"] = value
        for key, value in self.out_proj.named_parameters():
            state[f"cross_attn.out_proj.{key}"] = value
        return {key: value.detach() for key, value in state.items()}

    @torch.no_grad()
    def load_public_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy weights in from the public names; other names in ``state`` are left alone."""
        self.q_proj.copy_(state["cross_attn.q_proj_weight"])
        key = state["cross_attn.k_proj_weight"]
        self.k_proj.copy_(key[:, : self.width])
        self.k_proj_text.copy_(key[:, self.width :])
        self.v_proj.copy_(state["cross_attn.v_proj_weight"])
        biases = state["cross_attn.in_proj_bias"].chunk(3)
        for own, given in zip((self.q_bias, self.k_bias, self.v_bias), biases, strict=True):
            own.copy_(given)
        for name, owner in self.named_parameters():
            public = name.replace("out_proj.", "cross_attn.out_proj.")
            if "resblock" in name or "out_proj" in name:
                owner.copy_(state[public])


class ResidualBlock(nn.Module):
    """LN(x + W_down act(W_up x)), twice as wide inside (eq. 7; biases, norm as the public code)."""

    def __init__(self, width: int, act: str, *, recompute: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)
        self.ln = nn.LayerNorm(width)
        self.act, self.recompute = act_name(activation(act)), recompute

    def forward(self, x: Tensor) -> Tensor:
        """Refine (…, width)."""
        inner = gated_ffn(
            x,
            None,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            act=self.act,
            recompute=self.recompute,
        )
        return self.ln(x + inner)
