"""The experts of a CoMoE layer, stored as one wide feed-forward network.

A gated sum of FFNs is an FFN whose hidden units are the experts' side by side, scaled by the gates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from covft.models.vision.vit import MLP
from covft.vft.gated_ffn import act_name, gated_ffn


class WideExperts(nn.Module):
    """E feed-forward networks as one, E times as wide.

    Parameters: ``up`` (E F, D), ``up_bias`` (E F,), ``down`` (D, E F), ``down_bias`` (E, D).

    Args:
        ffn: The pretrained FFN; every expert starts as its copy.
        num_experts: Experts E.
        recompute: Keep only the inputs for the backward pass and redo the up-projection there.
    """

    def __init__(self, ffn: MLP, num_experts: int, *, recompute: bool = False) -> None:
        super().__init__()
        self.num_experts, self.act, self.recompute = num_experts, ffn.act, recompute
        self.act_name = act_name(ffn.act)
        with torch.no_grad():
            self.up = nn.Parameter(ffn.fc1.weight.repeat(num_experts, 1))
            self.up_bias = nn.Parameter(ffn.fc1.bias.repeat(num_experts))
            self.down = nn.Parameter(ffn.fc2.weight.repeat(1, num_experts))
            self.down_bias = nn.Parameter(ffn.fc2.bias.repeat(num_experts, 1))

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """Return the experts' outputs for (I, N, D) tokens, weighted by ``gates`` (I, E)."""
        return gated_ffn(
            x,
            gates,
            self.up,
            self.up_bias,
            self.down,
            self.down_bias,
            act=self.act_name,
            recompute=self.recompute,
        )

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
