"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, TypeVar

T = TypeVar("T")


def add_conditions(
    parser: argparse.ArgumentParser,
    *,
    threads: int,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Declare ``--threads``, and ``--dtype`` and ``--device`` where there is a default for them."""
    if dtype is not None:
        parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=dtype)
    parser.add_argument("--threads", type=int, default=threads)
    if device is not None:
        parser.add_argument("--device", choices=["cpu", "cuda"], default=device)


def settings_of(kind: type[T], args: argparse.Namespace) -> T:
    """Return a benchmark's settings, a dataclass, from options of the same names."""
    values: dict[str, Any] = {field.name: getattr(args, field.name) for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**values)
