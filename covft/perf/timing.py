"""What the benchmarks share: interleaved timings, stated conditions."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from covft import __version__
from covft.perf.malloc import malloc_settings


def interleaved_medians(
    runs: Mapping[str, Callable[[], object]], *, rounds: int, device: torch.device
) -> dict[str, float]:
    """Time several functions in turn: A B C A B C ..., after one round that isn't counted.

    What else the machine does, or how warm it is, then meets all of them alike.

    Args:
        runs: The functions by name.
        rounds: How often each is timed.
        device: Where they compute; the host waits for it before and after each.

    Returns:
        Each function's median in seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for counted in range(-1, rounds):
        for name, run in runs.items():
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            if counted >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def synchronise(device: torch.device) -> None:
    """Let the host wait for what the device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_device(name: str, *, instead: str = "--device cpu") -> None:
    """Raise a ValueError if a GPU is asked for in vain; it names what to use ``instead``."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda, but PyTorch finds no CUDA device; use {instead}")


@contextmanager
def num_threads(threads: int) -> Iterator[None]:
    """Let PyTorch compute with that many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def conditions(device: torch.device) -> dict[str, Any]:
    """Return what a measurement depends on besides its settings."""
    found = {
        "covft": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "malloc": malloc_settings(),
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def json_line(result: Mapping[str, Any]) -> str:
    """Return a result as one line of JSON, its figures rounded to four significant digits."""
    return json.dumps(_rounded(result))


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
