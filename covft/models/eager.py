"""Running a compiled model as it was written, for a while."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def running_eagerly() -> AbstractContextManager[Any]:
    """Return a context in which compiled modules run uncompiled.

    Generation calls a model with another length at every step, and would have it compiled anew.
    """
    # Where nothing has imported the compiler, nothing is compiled, and the import takes a second.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
