"""CoVFT: context-aware visual fine-tuning (CVPR 2026), sections 3.3 and 3.4.

From a block on, the FFN becomes a contextual mixture of experts (:class:`CoMoE`), routed per image
by a context vector that contextual vector extraction (:class:`CVE`) draws from the image's tokens
and the instruction. Trained are the CoMoE layers and the LayerNorms; all else stays frozen.

Deliberate deviations, each without effect on outputs or gradients:

* The experts are stored and computed as one wide FFN: a gated sum of FFNs is an FFN whose hidden
  units are the experts' side by side, scaled by the gates.
* The text half of CVE's key projection and the key bias add the same number to every token's
  score, which softmax removes. They hold no parameters here, only buffers, so that the public
  checkpoints' layout can be read and written.
* With one query per image the key projection is folded into the query, and values are projected
  after pooling: no keys or values of all tokens are formed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covft.models.text_encoder import Context
from covft.models.vision.tower import VisionTower
from covft.models.vision.vit import MLP, activation
from covft.registry import VFT
from covft.vft.base import VFTMethod


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


class CoMoE(nn.Module):
    """Experts copied from a pretrained FFN, mixed by context-routed weights (eq. 9-10).

    Args:
        ffn: The pretrained FFN; every expert starts as its copy.
        context_dim: Width C of the context.
        num_experts: Experts E.
        activation: Of CVE's residual blocks.
    """

    def __init__(self, ffn: MLP, *, context_dim: int, num_experts: int, activation: str) -> None:
        super().__init__()
        width = ffn.fc1.weight.shape[1]
        self.experts = WideExperts(ffn, num_experts)
        self.cve = CVE(width, context_dim, activation=activation).to(ffn.fc1.weight)
        self.gate = nn.Linear(context_dim, num_experts).to(ffn.fc1.weight)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Mix the experts' outputs.

        Args:
            x: Normalised tokens, (I, N, D).
            context: Frozen text features of each image's instruction; ``pooled`` is (I, C).

        Returns:
            Like ``x``; equal to the pretrained FFN at initialisation.

        Raises:
            ValueError: If there is no context, or not one row per image.
        """
        if context is None:
            raise ValueError(
                "CoMoE was called without context; pass the instruction's text features"
            )
        if len(context.pooled) != len(x):
            raise ValueError(f"{len(x)} images, but context rows for {len(context.pooled)}")
        gates = self.gate(self.cve(x, context.pooled)).softmax(-1)
        return self.experts(x, gates.to(x.dtype))

    def public_state_dict(self) -> dict[str, Tensor]:
        """Return the weights under the names and shapes of the public checkpoints' ``mlp.*``."""
        return {
            **{f"experts.{key}": value for key, value in self.experts.per_expert().items()},
            **self.cve.public_state_dict(),
            **{f"gate.{key}": value.detach() for key, value in self.gate.named_parameters()},
        }

    @torch.no_grad()
    def load_public_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy weights in from the public names.

        Raises:
            ValueError: If names or shapes aren't exactly those of this layer.
        """
        own = {key: tuple(value.shape) for key, value in self.public_state_dict().items()}
        given = {key: tuple(value.shape) for key, value in state.items()}
        if own != given:
            differing = sorted(
                key for key in own.keys() | given.keys() if own.get(key) != given.get(key)
            )
            lines = [f"{k}: expected {own.get(k)}, found {given.get(k)}" for k in differing[:10]]
            raise ValueError(f"{len(differing)} CoMoE weights don't fit:\n" + "\n".join(lines))
        self.experts.load_per_expert(state)
        self.cve.load_public_state_dict(state)
        self.gate.load_state_dict({"weight": state["gate.weight"], "bias": state["gate.bias"]})


class WideExperts(nn.Module):
    """E feed-forward networks as one, E times as wide.

    Parameters: ``up`` (E F, D), ``up_bias`` (E F,), ``down`` (D, E F), ``down_bias`` (E, D).
    """

    def __init__(self, ffn: MLP, num_experts: int) -> None:
        super().__init__()
        self.num_experts, self.act = num_experts, ffn.act
        with torch.no_grad():
            self.up = nn.Parameter(ffn.fc1.weight.repeat(num_experts, 1))
            self.up_bias = nn.Parameter(ffn.fc1.bias.repeat(num_experts))
            self.down = nn.Parameter(ffn.fc2.weight.repeat(1, num_experts))
            self.down_bias = nn.Parameter(ffn.fc2.bias.repeat(num_experts, 1))

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """Return the experts' outputs for (I, N, D) tokens, weighted by ``gates`` (I, E)."""
        hidden = self.act(F.linear(x, self.up, self.up_bias))
        hidden = hidden.unflatten(-1, (self.num_experts, -1)) * gates[:, None, :, None]
        return F.linear(hidden.flatten(-2), self.down) + (gates @ self.down_bias)[:, None]

    def per_expert(self) -> dict[str, Tensor]:
        """Return each expert's tensors: ``{n}.0`` is its up-, ``{n}.2`` its down-projection."""
        state = {}
        ups, biases = self.up.chunk(self.num_experts), self.up_bias.chunk(self.num_experts)
        for n, down in enumerate(self.down.chunk(self.num_experts, dim=1)):
            state[f"{n}.0.weight"], state[f"{n}.0.bias"] = ups[n].detach(), biases[n].detach()
            state[f"{n}.2.weight"], state[f"{n}.2.bias"] = down.detach(), self.down_bias[n].detach()
        return state

    def load_per_expert(self, state: dict[str, Tensor]) -> None:
        """Copy in tensors named ``experts.{n}.{0,2}.{weight,bias}``; names and shapes must fit."""
        for key, own in self.per_expert().items():
            own.copy_(state[f"experts.{key}"])


class CVE(nn.Module):
    """Contextual vector extraction: the refined text attends over the refined image (eq. 7-8).

    Args:
        width: Width D of the image tokens.
        context_dim: Width C of text and context vector.
        num_heads: Attention heads.
        activation: Of the residual blocks.
    """

    k_proj_text: Tensor
    k_bias: Tensor

    def __init__(
        self, width: int, context_dim: int, *, num_heads: int = 4, activation: str = "quick_gelu"
    ) -> None:
        super().__init__()
        if context_dim % num_heads:
            raise ValueError(f"context width {context_dim} isn't divisible by {num_heads} heads")
        self.width, self.num_heads = width, num_heads
        self.image_resblock = ResidualBlock(width, activation)
        self.text_resblock = ResidualBlock(context_dim, activation)
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

    def __init__(self, width: int, act: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width)
        self.act = activation(act)
        self.fc2 = nn.Linear(2 * width, width)
        self.ln = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Refine (…, width)."""
        return self.ln(x + self.fc2(self.act(self.fc1(x))))
