"""The experts of a CoMoE layer where most gates are zero: only the chosen ones are computed."""

from __future__ import annotations

import torch
from torch import Tensor

from covft.vft.experts import WideExperts
from covft.vft.gated_ffn import gated_ffn


def routed_experts(experts: WideExperts, x: Tensor, gates: Tensor) -> Tensor:
    """Return what ``experts(x, gates)`` does, computing each expert for its own images.

    Args:
        experts: The experts.
        x: Tokens, (I, N, D).
        gates: (I, E); zeros are left out.

    Returns:
        (I, N, D). Every expert is part of the graph, also where it has no image.
    """
    # Sorted by expert; reading the counts is the one point where the host waits for the device.
    expert, image = gates.detach().t().nonzero(as_tuple=True)
    counts = torch.bincount(expert, minlength=experts.num_experts).tolist()
    inputs = x.index_select(0, image).split(counts)
    weights = gates[image, expert].unsqueeze(1).split(counts)
    # Each wide weight is cut up once, so that its gradient is put together once.
    parts = zip(
        experts.up.chunk(experts.num_experts),
        experts.up_bias.chunk(experts.num_experts),
        experts.down.chunk(experts.num_experts, dim=1),
        experts.down_bias.split(1),
        strict=True,
    )
    outputs = [
        gated_ffn(tokens, gate, *part, act=experts.act_name, recompute=experts.recompute)
        for tokens, gate, part in zip(inputs, weights, parts, strict=True)
    ]
    chosen = torch.cat(outputs)
    return chosen.new_zeros(x.shape).index_add(0, image, chosen)
