"""Routers of CoMoE: each image's weights for the experts (CoVFT, section 3.4 and Table 2).

The paper routes densely (eq. 9) and names its ablations Random@k, Uniform and Sparse@k without
formulas. Choices:

* Sparse@k: the softmax is over the k largest logits, so the weights sum to 1 and the layer equals
  the pretrained FFN at initialisation. k = 1 is refused: its one weight is always 1, so that the
  task's loss would never reach the router.
* Random@k draws k experts per image and layer in training, weight 1/k each; evaluation uses the
  mean over all draws, which is Uniform, so that answers don't depend on a seed.
* The load-balancing loss is the Switch Transformer's (Fedus et al., JMLR 2022, eq. 4-6), with
  images in place of tokens and k dispatches an image.
* A router without input starts from logits that differ slightly: with equal ones, the experts
  would get equal gradients and stay equal for ever. Under Uniform they do: it trains one FFN.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covft.models.vision.auxiliary_loss import AuxiliaryLossModule
from covft.models.vision.vit import INIT_STD

_FORMS = "'dense', 'sparse@k', 'uniform' or 'random@k' with a number k"


@dataclass(frozen=True)
class Routing:
    """How the experts' weights come about.

    Attributes:
        kind: "dense", "sparse", "uniform" or "random".
        top_k: Experts per image of the sparse and random kinds; None for the others.
    """

    kind: str
    top_k: int | None = None

    @classmethod
    def parse(cls, text: str, num_experts: int) -> Routing:
        """Read a config's ``routing``, such as "dense" or "sparse@2".

        Raises:
            ValueError: If there is no such routing, not that many experts, or nothing to learn.
        """
        match = re.fullmatch(r"(dense|uniform)|(sparse|random)@(\d+)", str(text))
        if match is None:
            raise ValueError(f"vft.routing must be {_FORMS}, got {text!r}")
        if num_experts == 1 and (match[1] == "dense" or match[2] == "sparse"):
            raise ValueError(
                f"vft.num_experts=1 leaves routing {text!r} nothing to learn: a single expert's "
                "weight is always 1, so that router and CVE would get no gradient; use at least 2, "
                "or routing='uniform' to train one FFN alone"
            )
        if match[1]:
            return cls(match[1])
        kind, top_k = match[2], int(match[3])
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"vft.routing={text!r} chooses {top_k} of {num_experts} experts; choose "
                f"{2 if kind == 'sparse' else 1} to {num_experts}, or change vft.num_experts"
            )
        if kind == "sparse" and top_k == 1:
            raise ValueError(
                f"vft.routing={text!r} can't be trained: the weights of the chosen experts sum to "
                "1, so that of a single one is constant and its router gets no gradient from the "
                "task; use at least 'sparse@2' (top_k=1 exists at inference)"
            )
        return cls(kind, top_k)

    @property
    def learned(self) -> bool:
        """Whether a router is trained."""
        return self.kind in ("dense", "sparse")


def build_router(
    routing: Routing, num_experts: int, *, context_dim: int, balance_loss: float = 0.0
) -> Router | UniformRouter:
    """Return the router, called as ``router(c)`` on (I, context_dim), that returns (I, E) gates.

    Args:
        routing: Its kind.
        num_experts: Experts E.
        context_dim: Width of the context vector; 0 where the router has no input.
        balance_loss: Weight of the load-balancing loss, sparse routing only.
    """
    if routing.kind == "uniform":
        return UniformRouter(num_experts)
    if routing.kind == "random":
        assert routing.top_k is not None
        return RandomRouter(num_experts, routing.top_k)
    return Router(context_dim, num_experts, top_k=routing.top_k, balance_loss=balance_loss)


class Router(AuxiliaryLossModule):
    """Learned routing: softmax over linear logits of the context vector (eq. 9).

    Args:
        context_dim: Width of the context vector; 0 learns the logits themselves, for all images.
        num_experts: Experts E.
        top_k: Keep each image's k largest logits alone; None keeps all.
        balance_loss: Weight of the load-balancing loss over the images of a forward in training.
    """

    weight: Tensor | None

    def __init__(
        self,
        context_dim: int,
        num_experts: int,
        *,
        top_k: int | None = None,
        balance_loss: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_parameter("weight", None)
        if context_dim:
            linear = nn.Linear(context_dim, num_experts)
            self.weight, self.bias = linear.weight, linear.bias
        else:
            self.bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_experts), std=INIT_STD))
        self.top_k, self.balance_loss = top_k, balance_loss

    @property
    def sparse(self) -> bool:
        """Whether most gates may be zero, so that only some experts need computing."""
        return self.top_k is not None

    def forward(self, vector: Tensor) -> Tensor:
        """Return the gates (I, E), each row summing to 1, of context vectors (I, context_dim)."""
        if self.weight is None:
            logits = self.bias.expand(len(vector), -1)
        else:
            logits = F.linear(vector, self.weight, self.bias)
        if self.top_k is None:
            return logits.softmax(-1)
        chosen = largest(logits, self.top_k)
        if self.balance_loss and self.training:
            self.add_loss(self.balance_loss * load_balance(logits.softmax(-1), chosen))
        return logits.masked_fill(~chosen, -torch.inf).softmax(-1)


class UniformRouter(nn.Module):
    """Every expert at the same weight, for every image."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    @property
    def sparse(self) -> bool:
        """Whether most gates may be zero: here, none is."""
        return False

    def forward(self, vector: Tensor) -> Tensor:
        """Return 1 / E, (I, E), for a ``vector`` (I, 0), of which only the row count is read."""
        return vector.new_full((len(vector), self.num_experts), 1 / self.num_experts)


class RandomRouter(UniformRouter):
    """k experts drawn per image at weight 1 / k in training; uniform in evaluation."""

    def __init__(self, num_experts: int, top_k: int) -> None:
        super().__init__(num_experts)
        self.top_k = top_k

    @property
    def sparse(self) -> bool:
        """Whether most gates may be zero: in training only."""
        return self.training

    def forward(self, vector: Tensor) -> Tensor:
        """Return the gates, (I, E)."""
        gates = super().forward(vector)
        if not self.training:
            return gates
        chosen = largest(torch.rand_like(gates, dtype=torch.float32), self.top_k)
        return chosen.to(gates) / self.top_k


def largest(values: Tensor, top_k: int) -> Tensor:
    """Return a mask (I, E) of each row's ``top_k`` largest values, exactly that many."""
    chosen = torch.zeros_like(values, dtype=torch.bool)
    return chosen.scatter(1, values.topk(top_k, dim=1).indices, True)


def load_balance(probs: Tensor, chosen: Tensor) -> Tensor:
    """Return the Switch Transformer's load-balancing loss, E * sum_e f_e P_e.

    Args:
        probs: Softmax over all experts, (I, E); P_e is its mean over the images.
        chosen: Mask of the dispatches, (I, E); f_e is the expert's share of them.

    Returns:
        A scalar, 1 when both are uniform; without images a zero that is part of the graph.
    """
    share = chosen.sum(0).to(probs) / chosen.sum().clamp(min=1)
    mean = probs.sum(0) / max(len(probs), 1)
    return probs.shape[1] * (share * mean).sum()
