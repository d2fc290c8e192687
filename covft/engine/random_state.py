"""The state of every random generator a training run draws from, as plain values and tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def capture_random_state() -> dict[str, Any]:
    """Return the generators' state of this process, readable by ``torch.load(weights_only=True)``.

    Python's, NumPy's and torch's default generators, and the current CUDA device's where CUDA is
    in use.
    """
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    numpy_keys = torch.from_numpy(np.asarray(keys).astype(np.int64))
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, numpy_keys, int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put the generators back to a state of :func:`capture_random_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Let the body draw random numbers without changing what is drawn after it."""
    state = capture_random_state()
    try:
        yield
    finally:
        restore_random_state(state)
