"""Where a model is trained: one device, or several processes with replicas or shards of it."""

from covft.engine.strategies.base import LOG_NAME, STRATEGIES, Strategy
from covft.engine.strategies.choice import (
    NAMES,
    chosen_strategy,
    named_strategy,
    strategy_class,
    use_strategy,
)
from covft.engine.strategies.ddp import DDPStrategy
from covft.engine.strategies.deepspeed import ZeRO2Strategy, ZeRO3Strategy
from covft.engine.strategies.fsdp2 import FSDP2Strategy
from covft.engine.strategies.launch import LAUNCHERS, setup_distributed
from covft.engine.strategies.single import SingleDeviceStrategy

__all__ = [
    "LAUNCHERS",
    "LOG_NAME",
    "NAMES",
    "STRATEGIES",
    "DDPStrategy",
    "FSDP2Strategy",
    "SingleDeviceStrategy",
    "Strategy",
    "ZeRO2Strategy",
    "ZeRO3Strategy",
    "chosen_strategy",
    "named_strategy",
    "setup_distributed",
    "strategy_class",
    "use_strategy",
]
