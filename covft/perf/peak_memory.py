"""The most memory that a function holds at a time, from PyTorch's record of allocations."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

#: What the profiler calls devices.
_DEVICE_TYPES = {"cpu": 0, "cuda": 1}


@dataclass(frozen=True)
class PeakMemory:
    """What a function allocates, in bytes; what was there before isn't counted.

    Attributes:
        peak: The most that it held at a time.
        kept: What it left behind, such as gradients.
        temporary: The most that it held at a time of what it freed again, by itself.
    """

    peak: int
    kept: int
    temporary: int


def peak_memory(run: Callable[[], object], *, device: torch.device) -> PeakMemory:
    """Run a function once under PyTorch's profiler, and return what it allocated.

    Counted is what PyTorch's allocators hand out, with their rounding; not what libraries take
    beside them, such as a matrix product's workspace.

    Args:
        run: The function; what it returns is freed before the end.
        device: Whose memory is meant.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes of each start and end to stderr
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    found = [
        (event["ts"], event["args"]["Addr"], event["args"]["Bytes"])
        for event in trace
        if event.get("name") == "[memory]"
        and event["args"]["Device Type"] == _DEVICE_TYPES[device.type]
    ]
    return _summary([(address, size) for _, address, size in sorted(found)])


def _summary(changes: list[tuple[int, int]]) -> PeakMemory:
    """Summarise allocations (address, bytes) and releases (address, -bytes) in their order."""
    freed: list[bool] = [False] * len(changes)
    held: dict[int, int] = {}
    ours = []
    for index, (address, size) in enumerate(changes):
        if size > 0:
            held[address] = index
            ours.append(index)
        elif address in held:  # else it is older than the function
            freed[held.pop(address)] = True
            freed[index] = True
            ours.append(index)
    peak = temporary = now = now_temporary = 0
    for index in ours:
        size = changes[index][1]
        now += size
        now_temporary += size if freed[index] else 0
        peak, temporary = max(peak, now), max(temporary, now_temporary)
    return PeakMemory(peak=peak, kept=now, temporary=temporary)
