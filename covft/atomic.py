"""Files and folders that are wholly there or not at all, whenever the process is killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

#: Ending of files that are still being written; readers never look at them.
PARTIAL = ".partial"


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that a kill at any moment leaves the old content or the new one.

    The content goes to a temporary name in the same folder, is flushed to the disk and then takes
    the place of ``path``; the folder is flushed too, so that the order of two such writes survives
    a power cut.

    Args:
        path: The file to replace.
        write: Called with the temporary path; has to create that file.

    Raises:
        OSError: If the disk is full or the folder isn't writable; the old file is still there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        write(partial)
        _flush_to_disk(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _flush_to_disk(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file through :func:`atomic_write`."""
    atomic_write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def partial_folder(path: Path) -> Path:
    """Return under which name a folder is written that several processes write together."""
    return path.with_name(f".{path.name}{PARTIAL}")


def flush_folder(folder: Path) -> None:
    """Flush the files of a folder, and it itself, to the disk."""
    for path in sorted(folder.rglob("*")):
        _flush_to_disk(path)
    _flush_to_disk(folder)


def rename_folder(folder: Path, path: Path) -> None:
    """Give a written and flushed folder its name, at which nothing may be."""
    folder.replace(path)
    _flush_to_disk(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder so that a kill at any moment leaves it whole or without its name."""
    partial = partial_folder(path)
    shutil.rmtree(partial, ignore_errors=True)
    path.replace(partial)
    shutil.rmtree(partial)


def remove_partial_files(folder: Path) -> list[Path]:
    """Remove what killed writers left in ``folder``; the caller owns it alone by now."""
    leftovers = sorted(folder.glob(f".*{PARTIAL}"))
    for leftover in leftovers:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)
    return leftovers


def set_aside(paths: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Rename what an earlier run has left, so that nothing takes it for this run's.

    Args:
        paths: Files and folders; those that don't exist are passed over.

    Returns:
        Old and new paths. The new ones end in ``.old1``, or in the next number that is free for
        all of them: nothing is overwritten.
    """
    number = 1
    while any(path.with_name(f"{path.name}.old{number}").exists() for path in paths):
        number += 1
    found = [path for path in paths if path.exists()]
    return [(path, path.replace(path.with_name(f"{path.name}.old{number}"))) for path in found]


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some network file systems can't flush a folder; the rename itself is atomic there too.
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)
