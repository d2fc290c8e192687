"""Running a compiled model as it was written, for a while."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def running_eagerly() -> Iterator[None]:
    """Let compiled modules run uncompiled.

    Generation calls a model with another length at every step, and would have it compiled anew.
    """
    # Where nothing has imported the compiler, nothing is compiled, and the import takes a second.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    # Only here, since it has its effect from its call on.
    with torch.compiler.set_stance("force_eager"):
        yield
