"""How glibc hands out memory, which decides what large temporaries cost."""

from __future__ import annotations

import os
import platform
import sys

_KEEP_FREED_MEMORY = (
    "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184"
)


def malloc_settings() -> str:
    """Return the environment's settings of malloc: they decide what large temporaries cost."""
    names = sorted(
        name
        for name in os.environ
        if name in ("GLIBC_TUNABLES", "LD_PRELOAD") or name.startswith("MALLOC_")
    )
    return " ".join(f"{name}={os.environ[name]}" for name in names) or "default"


def reuse_memory() -> None:
    """Start the running script again with a malloc that keeps freed memory, if it doesn't already.

    By default, glibc asks the kernel for every block beyond 32 MiB and returns it right after: each
    use then costs a page fault every 4 KiB. What is above that size differs between variants whose
    work is the same. Elsewhere than on glibc, or where malloc is already set, a note is printed.
    """
    settings = malloc_settings()
    if settings == f"GLIBC_TUNABLES={_KEEP_FREED_MEMORY}":
        return
    if platform.libc_ver()[0] != "glibc" or settings != "default":
        print(
            f"--malloc reuse has no effect: malloc is set by the environment ({settings}) or isn't "
            "glibc's",
            file=sys.stderr,
        )
    else:
        sys.stdout.flush()
        environment = {**os.environ, "GLIBC_TUNABLES": _KEEP_FREED_MEMORY}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
