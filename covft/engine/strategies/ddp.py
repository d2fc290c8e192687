"""Distributed data parallel: every process holds everything, and gradients are averaged."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from covft.engine.strategies.base import STRATEGIES, Strategy


@STRATEGIES.register_module(name=["ddp", "DDPStrategy"])
class DDPStrategy(Strategy):
    """One replica of the model per process, on GPUs through NCCL or on CPUs through gloo."""

    name = "ddp"

    def _wrap_model(self, model: nn.Module) -> nn.parallel.DistributedDataParallel:
        # Every trainable parameter takes part in every micro-batch, also of text alone: the tower
        # then runs on zero images. So nothing has to be searched for what a backward left out.
        with warnings.catch_warnings():
            # The argument's new name is missing in older versions of torch that are supported.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            return nn.parallel.DistributedDataParallel(
                model.to(self.device),
                device_ids=[torch.cuda.current_device()] if torch.cuda.is_available() else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
