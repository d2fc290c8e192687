"""One process."""

from __future__ import annotations

from torch import nn

from covft.engine.strategies.base import STRATEGIES, Strategy


@STRATEGIES.register_module(name=["single", "SingleDeviceStrategy"])
class SingleDeviceStrategy(Strategy):
    """One process: the GPU if there is one, or the CPU."""

    name = "single"
    is_distributed = False

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        return model.to(self.device)
