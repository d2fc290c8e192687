"""Stands in for ``covft.weights`` where an exported model runs: its folder holds all weights."""

from __future__ import annotations

from pathlib import Path


def resolve(source: str | Path) -> Path:
    """Refuse to look for weights.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f"an exported model has all of its weights in its own folder, but '{source}' was asked "
        "for; load it by from_pretrained(...)"
    )


def resolve_tokenizer(source: str | Path) -> Path:
    """Refuse to look for a tokenizer, as :func:`resolve` does for weights.

    Raises:
        ValueError: Always.
    """
    return resolve(source)


def source_of(folder: Path) -> str:
    """Return the folder: what was read from it is not recorded."""
    return str(folder)
