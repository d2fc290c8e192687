"""Reading a foreign config so that nothing in it gets lost unnoticed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from covft.interop.references import Reference
from covft.registry import nearest

_REQUIRED = object()
#: How much of a value a note shows.
_SHOWN = 60


class Section:
    """A dict of a config; what isn't read from it by :meth:`finish` is noted.

    Args:
        values: The dict; it isn't changed.
        path: Where it stands, such as ``model.llm``.
        notes: Where notes are added, one line each.
    """

    def __init__(self, values: Mapping[str, Any], path: str, notes: list[str]) -> None:
        self._values = dict(values)
        self.path, self.notes = path, notes

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return a value; it counts as carried over.

        Raises:
            ValueError: If it's missing, and there is no default.
        """
        if key in self._values:
            return self._values.pop(key)
        if default is _REQUIRED:
            raise ValueError(f"{self.where(key)} is missing")
        return default

    def section(self, key: str) -> Section | None:
        """Return a dict inside, or None if it's missing or None.

        Raises:
            ValueError: If it's something else.
        """
        values = self.take(key, None)
        if values is None:
            return None
        if not isinstance(values, Mapping):
            raise ValueError(f"{self.where(key)} must be a dict, got {shown(values)}")
        return Section(values, self.where(key), self.notes)

    def kind(self, known: Mapping[str, Any], *, key: str = "type") -> Any:
        """Return what ``known`` holds for the name of the section's type.

        Raises:
            ValueError: If it's missing or unknown; the nearest known name is given.
        """
        value = self.take(key)
        name = value.short_name if isinstance(value, Reference) else value
        if name not in known:
            hint = nearest(str(name), known)
            raise ValueError(f"{self.where(key)} = {shown(value)} has no counterpart here; {hint}")
        return known[name]

    def expect(self, **defaults: Any) -> None:
        """Take what is this project's way as long as it has these values; other values are left."""
        for key, default in defaults.items():
            if key in self._values and self._values[key] == default:
                del self._values[key]

    def drop(self, key: str, reason: str) -> None:
        """Take a value, and note why it isn't carried over, if it's there."""
        if key in self._values:
            self.note(key, self._values.pop(key), reason)

    def note(self, key: str, value: Any, reason: str) -> None:
        """Add a note on one of the section's values."""
        self.notes.append(f"{self.where(key)} = {shown(value)}: {reason}")

    def where(self, key: str) -> str:
        """Return the dotted key of a value."""
        return f"{self.path}.{key}" if self.path else key

    def finish(self) -> None:
        """Note what hasn't been read."""
        for key in list(self._values):
            self.note(key, self._values.pop(key), "not carried over")


def shown(value: Any) -> str:
    """Return a value as text, shortened."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
