"""The contextual mixture of experts (CoVFT, section 3.4) that takes an FFN's place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from covft.models.text_encoder import Context
from covft.models.vision.vit import MLP
from covft.vft.cve import CVE
from covft.vft.experts import WideExperts


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
