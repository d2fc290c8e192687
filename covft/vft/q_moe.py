"""Q-MoE: a connector whose experts are chosen by the instruction (Wang et al., ACM MM 2024).

This is a reconstruction from the abstract (doi 10.1145/3664647.3681369), which names a query-based
connector, experts and text-driven routing, but no sizes, places or formulas. The encoder stays
frozen. With features z (N, D) of an image and its instruction's vector t (C,)::

    q = q_0, learned                                          (M, d)
    per layer, pre-LN:  q += SelfAttention(LN q)
                        q += CrossAttention(LN q <- W_z LN z)
                        q += r_e FFN_e(LN q),  e = argmax r,  r = softmax(W_r t + b_r)
    z' = z + tanh(gamma) W_out CrossAttention(LN z <- q)      (N, D)

Choices that the abstract leaves open, besides the sizes:

* A residual connector, closed at initialisation, keeps the token count, so that the projector of
  the alignment stage still fits and the method is compared under the same one.
* Attention's keys have no bias: softmax would make it ineffective. z's LayerNorm serves the layers
  and the last attention, W_z every layer.
* Every expert computes, and the gates of those not chosen are zero: their parameters stay in the
  graph for distributed training, and with M = 64 queries the connector is small beside the encoder.
* The abstract's "optimal path" training isn't reproduced: to find the best combination of experts
  takes the task's loss of each path, which a connector doesn't know. The router learns from that
  loss through the scale r_e, and from a load-balancing loss (Fedus et al., JMLR 2022, eq. 4),
  E sum_e f_e mean(r_e) over the images of the batch, where f_e is the share of them that chose e.
  The loss is the mean over the layers, as CoVFT's is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from covft.models.text_encoder import Context
from covft.models.vision.auxiliary_loss import AuxiliaryLossModule
from covft.models.vision.backbone import VisionBackbone
from covft.models.vision.tower import VisionTower
from covft.registry import VFT
from covft.vft.base import VFTMethod, check_context
from covft.vft.router import largest, load_balance

QUERY_STD = 0.02


@VFT.register_module(name=["QMoE", "Q-MoE"])
class QMoE(VFTMethod):
    """Frozen encoder, then a query connector with text-routed experts (our reconstruction).

    The learning rate, 1e-4, is a choice: the peak rate of BLIP-2's query connector (Li et al.,
    ICML 2023), which is trained from scratch too.

    Args:
        num_queries: Learned queries M.
        dim: Their width d.
        num_layers: Layers of the connector.
        num_experts: Experts E of a layer; one is chosen per image.
        num_heads: Attention heads.
        ffn_dim: Hidden width of an expert; 4 ``dim`` by default.
        balance_loss: Weight of the load-balancing loss, a mean over the layers; 0 turns it off.

    Raises:
        ValueError: If a size isn't positive, ``num_experts`` is below 2, ``dim`` isn't divisible by
            ``num_heads``, or ``balance_loss`` is negative.
    """

    needs_context = True
    learning_rate = 1e-4

    def __init__(
        self,
        *,
        num_queries: int = 64,
        dim: int = 512,
        num_layers: int = 2,
        num_experts: int = 4,
        num_heads: int = 8,
        ffn_dim: int | None = None,
        balance_loss: float = 0.01,
    ) -> None:
        self.options = {
            "num_queries": num_queries,
            "dim": dim,
            "num_layers": num_layers,
            "num_experts": num_experts,
            "num_heads": num_heads,
            "ffn_dim": 4 * dim if ffn_dim is None else ffn_dim,
        }
        for name, value in self.options.items():
            least = 2 if name == "num_experts" else 1
            if value < least:
                raise ValueError(f"vft.{name} must be at least {least}, got {value}")
        if dim % num_heads:
            raise ValueError(f"vft.dim ({dim}) must be a multiple of vft.num_heads ({num_heads})")
        if balance_loss < 0:
            raise ValueError(f"vft.balance_loss must not be negative, got {balance_loss}")
        self.balance_loss = balance_loss

    def apply(self, tower: VisionTower) -> nn.Module:
        """Freeze the encoder.

        Returns:
            The connector.

        Raises:
            ValueError: If there is no text encoder.
        """
        if tower.context_dim is None:
            raise ValueError("QMoE needs a text encoder; add model.text_encoder to the config")
        tower.backbone.requires_grad_(False)
        return QMoEConnector(
            tower.hidden_dim,
            context_dim=tower.context_dim,
            balance_loss=self.balance_loss,
            **self.options,
        ).to(tower.backbone.patch_embed.weight)

    def context_free_blocks(self, backbone: VisionBackbone) -> int:
        """Return the number of all blocks: the connector alone reads the context."""
        return len(backbone.blocks)


class QMoEConnector(nn.Module):
    """Queries that read an image through text-routed experts, and add what they found to it.

    Shapes: I images, N patch tokens of width D, M queries of width d, C context width.

    Args:
        width: Width D of the features.
        context_dim: Width C of the context.
        num_queries: Queries M.
        dim: Their width d.
        num_layers: Layers.
        num_experts: Experts E of a layer.
        num_heads: Attention heads.
        ffn_dim: Hidden width of an expert.
        balance_loss: Weight of the load-balancing loss, a mean over the layers.
    """

    def __init__(
        self,
        width: int,
        *,
        context_dim: int,
        num_queries: int,
        dim: int,
        num_layers: int,
        num_experts: int,
        num_heads: int,
        ffn_dim: int,
        balance_loss: float,
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(num_queries, dim))
        nn.init.trunc_normal_(self.queries, std=QUERY_STD)
        self.norm = nn.LayerNorm(width)
        self.feature_proj = nn.Linear(width, dim)
        self.layers = nn.ModuleList(
            QMoELayer(
                dim,
                num_heads=num_heads,
                ffn_dim=ffn_dim,
                router=TextRouter(context_dim, num_experts, balance_loss=balance_loss / num_layers),
            )
            for _ in range(num_layers)
        )
        self.readout = QueryAttention(dim, num_heads, query_dim=width)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, features: Tensor, context: Context | None) -> Tensor:
        """Add what the queries found to the features.

        Args:
            features: The frozen encoder's patch tokens, (I, N, D).
            context: Frozen text features of each image's instruction; ``pooled`` is (I, C).

        Returns:
            Like ``features``; equal to them at initialisation.

        Raises:
            ValueError: If there is no context, or not one row per image.
        """
        text = check_context(context, len(features), reader="QMoE's connector").pooled
        normed = self.norm(features)
        memory = self.feature_proj(normed)
        queries = self.queries.expand(len(features), -1, -1)
        for layer in self.layers:
            queries = layer(queries, memory, text.to(features.dtype))
        found = self.gamma.tanh() * self.readout(normed, queries)
        return features + found.to(features.dtype)


class QMoELayer(nn.Module):
    """Self-attention of the queries, cross-attention to the image, and one expert.

    Args:
        dim: Width d of the queries and of the projected image tokens.
        num_heads: Attention heads.
        ffn_dim: Hidden width of an expert.
        router: Chooses among its number of experts.
    """

    def __init__(self, dim: int, *, num_heads: int, ffn_dim: int, router: TextRouter) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = QueryAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attn = QueryAttention(dim, num_heads)
        self.norm3 = nn.LayerNorm(dim)
        self.router = router
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, dim))
            for _ in range(router.num_experts)
        )

    def forward(self, queries: Tensor, memory: Tensor, text: Tensor) -> Tensor:
        """Update the queries.

        Args:
            queries: (I, M, d).
            memory: The image's tokens, projected, (I, N, d).
            text: One vector of each image's instruction, (I, C).

        Returns:
            (I, M, d).
        """
        normed = self.norm1(queries)
        queries = queries + self.self_attn(normed, normed)
        queries = queries + self.cross_attn(self.norm2(queries), memory)
        gates, normed = self.router(text), self.norm3(queries)
        for gate, expert in zip(gates.unbind(-1), self.experts, strict=True):
            queries = queries + gate[:, None, None] * expert(normed)
        return queries


class TextRouter(AuxiliaryLossModule):
    """Choose one expert per image by its instruction alone.

    Args:
        context_dim: Width C of the context.
        num_experts: Experts E.
        balance_loss: Weight of the load-balancing loss that it adds in training; 0 adds none.
    """

    def __init__(self, context_dim: int, num_experts: int, *, balance_loss: float) -> None:
        super().__init__()
        self.num_experts, self.balance_loss = num_experts, balance_loss
        self.proj = nn.Linear(context_dim, num_experts)

    def forward(self, text: Tensor) -> Tensor:
        """Return gates (I, E) for texts (I, C): r_e for the likeliest expert, zero elsewhere."""
        probs = self.proj(text).softmax(-1)
        chosen = largest(probs, 1)
        if self.training and self.balance_loss:
            self.add_loss(self.balance_loss * load_balance(probs, chosen))
        return chosen * probs


class QueryAttention(nn.Module):
    """Multi-head attention of queries (I, L, query_dim) over a memory (I, S, dim).

    The output is as wide as the queries.

    Args:
        dim: Width of the memory and of the attention.
        num_heads: Attention heads.
        query_dim: Width of the queries; ``dim`` by default.
    """

    def __init__(self, dim: int, num_heads: int, *, query_dim: int | None = None) -> None:
        super().__init__()
        query_dim = dim if query_dim is None else query_dim
        self.num_heads = num_heads
        self.q_proj = nn.Linear(query_dim, dim)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, query_dim)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """Return what each query finds, (I, L, query_dim)."""
        query, key, value = (
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for states in (self.q_proj(queries), self.k_proj(memory), self.v_proj(memory))
        )
        # Written out: one side is only M long, and fused kernels refuse a batch without images.
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        mixed = scores.softmax(-1).to(value.dtype) @ value
        return self.out_proj(mixed.transpose(1, 2).flatten(2))
