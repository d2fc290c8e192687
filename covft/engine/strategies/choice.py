"""Which strategy a config or command line asks for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config

from covft.engine.strategies.base import STRATEGIES, Strategy
from covft.registry import check_config, nearest

#: What the engine gives every strategy.
_GIVEN = {"work_dir": "", "experiment_name": "", "env_kwargs": None}
NAMES = ("ddp", "fsdp2", "zero2", "zero3")
#: The names of xtuner's ``--deepspeed``.
_XTUNER_NAMES: dict[str, dict[str, Any]] = {
    "deepspeed_zero2": {"type": "zero2"},
    "deepspeed_zero2_offload": {"type": "zero2", "offload_optimizer": "cpu"},
    "deepspeed_zero3": {"type": "zero3"},
    "deepspeed_zero3_offload": {
        "type": "zero3",
        "offload_optimizer": "cpu",
        "offload_param": "cpu",
    },
}


def named_strategy(name: str) -> dict[str, Any]:
    """Return the ``strategy`` of a config that a name on the command line means.

    Args:
        name: "ddp", "fsdp2", "zero2", "zero3", or one of xtuner's, such as "deepspeed_zero3".

    Raises:
        ValueError: If it is unknown.
    """
    if name in NAMES:
        return {"type": name}
    if name not in _XTUNER_NAMES:
        raise ValueError(f"strategy '{name}' is unknown; {nearest(name, (*NAMES, *_XTUNER_NAMES))}")
    return dict(_XTUNER_NAMES[name])


def use_strategy(cfg: Config, name: str) -> None:
    """Set the strategy of a config, in all stages, to one by name; its options there are kept.

    Raises:
        ValueError: If it is unknown.
    """
    strategy = named_strategy(name)
    for part in (cfg, *(cfg.get("stages") or {}).values()):
        found = part.get("strategy") or {}
        # By class: a config may name the same strategy by its class or another of its names.
        kept = found if found and strategy_class(found) is strategy_class(strategy) else {}
        if found or part is cfg:
            part["strategy"] = {**kept, **strategy}


def chosen_strategy(strategy: Mapping[str, Any] | None, launcher: str) -> dict[str, Any]:
    """Return the ``strategy`` of a run: the config's, or the one that goes with the launcher.

    Raises:
        ValueError: If the config's is unknown, has other options, or doesn't go with the launcher.
    """
    if not strategy:
        return {"type": "single" if launcher == "none" else "ddp"}
    kind = strategy_class(strategy)
    if kind.is_distributed and launcher == "none":
        raise ValueError(
            f"strategy '{kind.name}' takes several processes: start them with "
            "tools/dist_train.sh CONFIG GPUS, or give tools/train.py the --launcher; or remove it"
        )
    if not kind.is_distributed and launcher != "none":
        raise ValueError(
            f"strategy '{kind.name}' is one process alone, but launcher '{launcher}' starts "
            f"several; use one of {', '.join(NAMES)}"
        )
    return dict(strategy)


def strategy_class(strategy: Mapping[str, Any]) -> type[Strategy]:
    """Return the class that a ``strategy`` names, its options checked.

    Raises:
        ValueError: If there is none, or it has no such option.
    """
    check_config(strategy, STRATEGIES, _GIVEN)
    kind = strategy["type"]
    kind = STRATEGIES.get(kind) if isinstance(kind, str) else kind
    if not (isinstance(kind, type) and issubclass(kind, Strategy)):
        raise ValueError(f"strategy '{strategy['type']}' is not one of {', '.join(NAMES)}")
    known = _options(kind)
    for option in strategy:
        if option not in known and option != "type":
            hint = nearest(option, known) if known else "it has none"
            raise ValueError(f"strategy '{kind.name}' has no option '{option}'; {hint}")
    return kind


def _options(kind: type[Strategy]) -> set[str]:
    """Return what a config can set: constructors pass what the engine gives through as keywords."""
    constructors = [base.__init__ for base in kind.__mro__ if issubclass(base, Strategy)]
    parameters = [p for init in constructors for p in inspect.signature(init).parameters.values()]
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - _GIVEN.keys()
