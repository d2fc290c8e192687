"""The cache folder: its place, and how an entry gets into it whole."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

SOURCE_FILE = "source.json"


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """Return ``cache_dir``, else ``$COVFT_CACHE``, else ``~/.cache/covft``."""
    return Path(cache_dir or os.environ.get("COVFT_CACHE") or "~/.cache/covft").expanduser()


def build_once(target: Path, build: Callable[[Path], Path]) -> Path:
    """Return ``target``, preparing it first if it isn't there.

    The work happens in a hidden folder beside ``target``, which is then renamed: a killed process
    leaves no half-made entry, and the next one clears its remains. A second process waits for the
    first and uses its result.

    Args:
        target: A file or folder of the cache.
        build: Called with an empty folder; returns the finished file or folder, inside of it.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{target.name}.lock"):
        if target.exists():
            return target
        partial = target.parent / f".{target.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            build(partial).replace(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def record_source(folder: Path, *, source: str, **details: str) -> None:
    """Write where ``folder`` came from into it, and make its files as readable as that record.

    safetensors creates its files for the owner alone, which would spoil a cache shared by a group.
    """
    record = folder / SOURCE_FILE
    record.write_text(json.dumps({"source": source, **details}, indent=2) + "\n")
    mode = stat.S_IMODE(record.stat().st_mode)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def recorded_source(folder: Path) -> str | None:
    """Return what :func:`record_source` wrote into ``folder``, if it did."""
    record = folder / SOURCE_FILE
    return json.loads(record.read_text())["source"] if record.is_file() else None


def say(message: str) -> None:
    """Print one line of progress; to stderr, since a tool's stdout may be read by a program."""
    print(f"covft: {message}", file=sys.stderr, flush=True)
