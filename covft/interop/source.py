"""Writing a config as a Python file of this project's style: classes by import, dict(...)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_WIDTH = 100


def config_source(config: Mapping[str, Any], *, description: str) -> str:
    """Return the source of a config file.

    Args:
        config: Keys and plain values; classes may be values anywhere.
        description: What the file's docstring says.
    """
    imports: dict[str, set[str]] = {}
    for kind in _classes(config):
        imports.setdefault(_public_module(kind), set()).add(kind.__name__)
    third = [module for module in sorted(imports) if not module.startswith("covft")]
    own = [module for module in sorted(imports) if module.startswith("covft")]
    blocks = [
        "\n".join(f"from {module} import {', '.join(sorted(imports[module]))}" for module in group)
        for group in (third, own)
        if group
    ]
    escaped = description.replace("\\", "\\\\").replace('"""', "'''")
    keys = "\n".join(f"{key} = {_text(value, '', len(key) + 3)}" for key, value in config.items())
    return "\n\n".join([f'"""{escaped}\n"""', *blocks, keys]) + "\n"


def _classes(value: Any) -> list[type]:
    if isinstance(value, type):
        return [value]
    if isinstance(value, Mapping):
        return [kind for item in value.values() for kind in _classes(item)]
    if isinstance(value, (list, tuple)):
        return [kind for item in value for kind in _classes(item)]
    return []


def _public_module(kind: type) -> str:
    """Return the package that exports a class: ``covft.models`` for covft.models.vision.clip."""
    parts = kind.__module__.split(".")
    return ".".join(parts[:2])


def _text(value: Any, indent: str, offset: int) -> str:
    """Return a value's source; ``offset`` is how far its line already reaches."""
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        plain = all(str(key).isidentifier() for key in value)
        heads = [f"{key}=" if plain else f"{json.dumps(key)}: " for key in value]
        brackets, items = ("dict(", ")") if plain else ("{", "}"), list(value.values())
    elif isinstance(value, (list, tuple)):
        heads, items = [""] * len(value), list(value)
        brackets = ("[", "]") if isinstance(value, list) else ("(", ",)"[len(value) != 1 :])
    else:
        return repr(value)

    def joined(inner: str, separator: str) -> str:
        parts = zip(heads, items, strict=True)
        return separator.join(
            head + _text(v, inner, len(inner) + len(head) + 1) for head, v in parts
        )

    one_line = brackets[0] + joined(indent, ", ") + brackets[1]
    if "\n" not in one_line and offset + len(one_line) <= _WIDTH:
        return one_line
    inner = f"{indent}    "
    body = joined(inner, f",\n{inner}")
    return f"{brackets[0]}\n{inner}{body},\n{indent}{brackets[1][-1]}"
