"""Stands in for ``mmengine.registry`` where an exported model runs: names to classes, no more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class Registry:
    """Classes by name, with what :class:`covft.registry.Registry` uses of mmengine's registry.

    Args:
        name: What is registered, for errors.
        build_func: Called as ``build_func(cfg, default_args=..., registry=self)``.
        parent: Not used: an exported model has no parts but its own.
        scope: Not used.
        locations: Not used: an exported model imports what it is made of.
    """

    def __init__(
        self,
        name: str,
        *,
        build_func: Callable[..., Any],
        parent: Registry | None = None,
        scope: str | None = None,
        locations: Sequence[str] = (),
    ) -> None:
        self.name, self.build_func, self.parent = name, build_func, parent
        self.module_dict: dict[str, Callable[..., Any]] = {}

    def register_module(self, name: str | Sequence[str] | None = None) -> Callable[[Any], Any]:
        """Return a decorator that registers a class or function."""

        def register(module: Any) -> Any:
            names = [name or module.__name__] if name is None or isinstance(name, str) else name
            self.module_dict.update(dict.fromkeys(names, module))
            return module

        return register

    def get(self, name: str) -> Callable[..., Any] | None:
        """Return what is registered under a name; None if nothing is."""
        return self.module_dict.get(name)

    def build(self, cfg: Any, default_args: Any = None) -> Any:
        """Build what ``cfg["type"]`` names."""
        return self.build_func(cfg, default_args=default_args, registry=self)

    def import_from_location(self) -> None:
        """Do nothing: whatever there is has been imported."""


class _NoParents:
    """mmengine's own registries, which have nothing that an exported model is made of."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


registry = _NoParents()
