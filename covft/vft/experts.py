"""The experts of a CoMoE layer, stored and computed as one wide feed-forward network.

A gated sum of FFNs is an FFN whose hidden units are the experts' side by side, scaled by the gates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covft.models.vision.vit import MLP


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
