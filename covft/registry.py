"""The registries that configs choose from.

Each is a child of the mmengine registry of the same purpose, or a new one where mmengine has none.
Building goes through :func:`build_from_config`, so that a misspelt name or an unknown argument is
answered with the nearest match instead of a bare ``KeyError`` or ``TypeError``.
"""

from __future__ import annotations

import difflib
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from mmengine import registry as mmengine_registry
from mmengine.registry import Registry as MMEngineRegistry

#: Annotations that a config's values are checked against, and what counts as one of them.
_SIMPLE_TYPES: dict[Any, tuple[type, ...]] = {
    int: (numbers.Integral,),
    float: (numbers.Real,),
    bool: (bool, np.bool_),
    str: (str,),
    types.NoneType: (types.NoneType,),
}


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint that names the closest of ``known``, or all of them when none is close."""
    names = sorted(set(known))
    by_lower = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.5)
    if close:
        return f"did you mean '{by_lower[close[0]]}'? (known: {', '.join(names)})"
    return f"known: {', '.join(names)}"


def shortened(names: Sequence[str], limit: int = 8) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def build_from_config(
    cfg: Mapping[str, Any],
    registry: Registry,
    default_args: Mapping[str, Any] | None = None,
) -> Any:
    """Build an object from ``dict(type=..., **arguments)``.

    Args:
        cfg: A mapping with ``type``, a class or a registered name; it isn't changed.
        registry: Where names are looked up.
        default_args: Arguments used where ``cfg`` doesn't give them.

    Raises:
        TypeError: If ``cfg`` is no mapping.
        ValueError: If ``type`` is missing or unknown, or an argument isn't the class's.
    """
    kind, arguments = _checked(cfg, registry, default_args)
    return kind(**arguments)


def check_config(
    cfg: Mapping[str, Any],
    registry: Registry,
    default_args: Mapping[str, Any] | None = None,
) -> None:
    """Find what :func:`build_from_config` would refuse in a config, without building it.

    Args:
        cfg: See :func:`build_from_config`.
        registry: See :func:`build_from_config`.
        default_args: Stand-ins for the arguments that the code adds.

    Raises:
        TypeError: See :func:`build_from_config`.
        ValueError: See :func:`build_from_config`.
    """
    _checked(cfg, registry, default_args)


def _checked(
    cfg: Mapping[str, Any], registry: Registry, default_args: Mapping[str, Any] | None
) -> tuple[Callable[..., Any], dict[str, Any]]:
    if not isinstance(cfg, Mapping):
        raise TypeError(f"{registry.name}: expected a dict with 'type', got {type(cfg).__name__}")
    arguments = {**(default_args or {}), **cfg}
    kind = arguments.pop("type", None)
    if kind is None:
        raise ValueError(f"{registry.name}: 'type' is missing in {dict(cfg)}")
    if isinstance(kind, str):
        kind = _found(kind, registry)
    elif not callable(kind):
        raise ValueError(f"{registry.name}: 'type' must be a class or a name, got {kind!r}")
    check_arguments(kind, arguments)
    return kind, arguments


def check_arguments(
    function: Callable[..., Any], arguments: Mapping[str, Any], *, where: str = ""
) -> None:
    """Check arguments that come from a config against what a class or function takes.

    Args:
        function: The class or function.
        arguments: The arguments by name.
        where: The config key they stand under; by default the function's name.

    Raises:
        ValueError: If one is unknown, with the nearest match, or a required one is missing; or if a
            value isn't of its parameter's type, where that is int, float, bool, str, None or one
            of several of them. What other annotations ask for is the function's own to check.
    """
    parameters = inspect.signature(function).parameters
    where = where or function.__name__
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in arguments:
            if name not in parameters:
                hint = nearest(name, parameters) if parameters else "it takes none"
                raise ValueError(f"'{where}' takes no argument '{name}'; {hint}")
    named = (p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    missing = [p.name for p in named if p.default is p.empty and p.name not in arguments]
    if missing:
        raise ValueError(f"'{where}' needs {', '.join(repr(name) for name in missing)}")
    _check_types(function, parameters, arguments, where)


def _check_types(
    function: Callable[..., Any],
    parameters: Mapping[str, inspect.Parameter],
    arguments: Mapping[str, Any],
    where: str,
) -> None:
    called: Any = function
    called = inspect.unwrap(called.__init__ if isinstance(function, type) else called)
    namespace = getattr(called, "__globals__", {})
    for name, value in arguments.items():
        parameter = parameters.get(name)
        # Older code annotates ``x: int = None``; what a function has as default, it takes.
        if parameter is None or value is parameter.default:
            continue
        wanted = _simple_types(parameter.annotation, namespace)
        if wanted and not any(_is_a(value, kind) for kind in wanted):
            names = ["None" if kind is types.NoneType else kind.__name__ for kind in wanted]
            raise ValueError(
                f"'{where}' needs {name}: {' or '.join(names)}, got {value!r} "
                f"({type(value).__name__})"
            )


def _simple_types(annotation: Any, namespace: dict[str, Any]) -> list[type]:
    """Return the simple types that an annotation allows; none if it allows anything else."""
    if isinstance(annotation, str):
        # One at a time: beside it may stand one that is imported for type checkers alone.
        holder: Any = types.SimpleNamespace(__annotations__={"it": annotation})
        try:
            annotation = typing.get_type_hints(holder, namespace)["it"]
        except (NameError, AttributeError, TypeError, SyntaxError):
            return []
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    allowed = list(typing.get_args(annotation)) if is_union else [annotation]
    is_simple = all(isinstance(kind, type) and kind in _SIMPLE_TYPES for kind in allowed)
    return allowed if is_simple else []


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool) and kind is not bool:  # Python counts it among the integers
        return False
    return isinstance(value, _SIMPLE_TYPES[kind])


def _found(name: str, registry: Registry) -> Callable[..., Any]:
    try:
        found = registry.get(name)
    except (ImportError, RuntimeError):  # a dotted path that leads nowhere
        found = None
    if not callable(found):
        raise ValueError(f"'{name}' is not a {registry.name}; {nearest(name, registry.names())}")
    return found


class Registry(MMEngineRegistry):
    """An mmengine registry whose ``build`` explains what is wrong with a config."""

    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__(name, build_func=build_from_config, scope="covft", **kwargs)

    def names(self) -> list[str]:
        """Return every name that can be built here, the parent registries' included."""
        self.import_from_location()
        known = set(self.module_dict)
        parent = self.parent
        while parent is not None:
            known |= set(parent.module_dict)
            parent = parent.parent
        return sorted(known)


MODELS = Registry("model", parent=mmengine_registry.MODELS, locations=["covft.models"])
DATASETS = Registry("dataset", parent=mmengine_registry.DATASETS, locations=["covft.datasets"])
SAMPLERS = Registry("sampler", parent=mmengine_registry.DATA_SAMPLERS, locations=["covft.datasets"])
HOOKS = Registry("hook", parent=mmengine_registry.HOOKS, locations=["covft.engine"])
LOOPS = Registry("loop", parent=mmengine_registry.LOOPS, locations=["covft.engine"])
OPTIM_WRAPPERS = Registry(
    "optim_wrapper", parent=mmengine_registry.OPTIM_WRAPPERS, locations=["covft.engine"]
)

VISION_BACKBONES = Registry("vision backbone", locations=["covft.models.vision"])
PROJECTORS = Registry("projector", locations=["covft.models"])
LLMS = Registry("LLM", locations=["covft.models"])
TEXT_ENCODERS = Registry("text encoder", locations=["covft.models"])
VFT = Registry("VFT method", locations=["covft.vft"])
TEMPLATES = Registry("conversation template", locations=["covft.conversation"])
BENCHMARKS = Registry("benchmark", locations=["covft.evaluation"])
