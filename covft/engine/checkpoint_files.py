"""Checkpoints as files: their names, writing, reading and pruning them.

A checkpoint is a file ``iter_N.pth``, or, where an engine keeps a model in shards, a folder
``iter_N`` with a file of what all processes share and the shards of each.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging import Logger
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, barrier, broadcast_object_list, is_main_process

from covft.atomic import (
    atomic_write,
    atomic_write_text,
    flush_folder,
    partial_folder,
    remove_folder,
    remove_partial_files,
    rename_folder,
)
from covft.checkpoints.sharded import SHARDS_NAME, STATE_NAME, is_sharded

#: Names the newest checkpoint, for scripts that read this file of mmengine's runs.
LAST_CHECKPOINT = "last_checkpoint"
_NAME = re.compile(r"iter_(\d+)(\.pth)?")
#: Of what :func:`read_checkpoint` understands.
FORMAT = 2


def checkpoint_path(work_dir: Path, iteration: int, *, sharded: bool = False) -> Path:
    """Return where the checkpoint after ``iteration`` steps is kept."""
    return work_dir / (f"iter_{iteration}" if sharded else f"iter_{iteration}.pth")


def find_checkpoints(work_dir: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest (by steps) first."""
    found = [
        path
        for path in work_dir.glob("iter_*")
        if _NAME.fullmatch(path.name) and path.is_dir() == (not path.suffix)
    ]
    return sorted(found, key=iteration_of, reverse=True)


def iteration_of(path: Path) -> int:
    """Return after how many steps a checkpoint of :func:`find_checkpoints` was written."""
    match = _NAME.fullmatch(path.name)
    assert match, f"{path} isn't named like a checkpoint"
    return int(match[1])


def write_checkpoint(state: Mapping[str, Any], work_dir: Path, *, max_keep: int) -> Path:
    """Write a checkpoint; then, and only then, remove the oldest of more than ``max_keep``.

    Args:
        state: What is in it; ``state["meta"]["iter"]`` names it.
        work_dir: Where.
        max_keep: How many are kept, of both kinds.
    """
    path = checkpoint_path(work_dir, state["meta"]["iter"])
    atomic_write(path, lambda partial: torch.save(dict(state), partial))
    _announce(path, max_keep=max_keep)
    return path


def write_sharded_checkpoint(
    state: Mapping[str, Any],
    work_dir: Path,
    *,
    save_shards: Callable[[Path], None],
    max_keep: int,
) -> Path:
    """Write a sharded checkpoint like :func:`write_checkpoint`; all processes take part.

    Args:
        state: What isn't sharded.
        work_dir: A folder that all processes see.
        save_shards: Writes this process's shards into the folder that it is given.
        max_keep: How many are kept, of both kinds.

    Raises:
        ValueError: If this process doesn't see what the main one writes.
    """
    path = checkpoint_path(work_dir, state["meta"]["iter"], sharded=True)
    partial = partial_folder(path)
    shards = partial / SHARDS_NAME
    if is_main_process():
        remove_partial_files(work_dir)
        shards.mkdir(parents=True)
    barrier()
    if not shards.is_dir():
        raise ValueError(
            f"{shards}, which the main process has made, isn't there: sharded checkpoints need a "
            "--work-dir on a file system that all nodes share, or checkpoint.sharded=False"
        )
    save_shards(shards)
    flush_folder(shards)
    barrier()
    if is_main_process():
        sizes = {name: file.stat().st_size for name, file in _files(shards).items()}
        torch.save({**state, "shards": sizes}, partial / STATE_NAME)
        flush_folder(partial)
        rename_folder(partial, path)
        _announce(path, max_keep=max_keep)
    return path


def read_checkpoint(path: Path, *, verify: bool = True) -> dict[str, Any]:
    """Read a checkpoint; of a sharded one, what isn't sharded.

    Tensors are mapped from the file and read when they are used: of a whole checkpoint, a process
    of many needs but its part.

    Args:
        path: The checkpoint.
        verify: Compare the checksums first, which reads the whole file.

    Raises:
        FileNotFoundError: If it doesn't exist.
        ValueError: If it is torn, or no checkpoint of this project.
    """
    file = path / STATE_NAME if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint at '{path}'")
    try:
        if verify:
            # torch.load doesn't look at the checksums that torch.save has written.
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"the checksum of its part '{damaged}' is wrong")
        state = torch.load(str(file), map_location="cpu", weights_only=True, mmap=True)
    # torch raises RuntimeError, EOFError, UnpicklingError, ... depending on where a file is torn.
    except Exception as error:
        raise ValueError(f"checkpoint {path} can't be read: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of this version of covft (format {FORMAT})")
    if is_sharded(path):
        _check_shards(path, state["shards"])
    return state


def read_resumed(
    work_dir: Path, resume: bool | str, logger: Logger
) -> tuple[Path, dict[str, Any]] | None:
    """Read the checkpoint to continue from, the same in all processes, which all take part.

    The main process chooses and verifies it: processes that see different files would otherwise
    go on from different steps, and wait for each other forever.

    Args:
        work_dir: This process's view of the run's folder.
        resume: True for the newest readable checkpoint there; or a path.
        logger: Told of the checkpoints that can't be read.

    Returns:
        Path and content, or None if the main process sees no readable checkpoint.

    Raises:
        FileNotFoundError: If ``resume`` names a checkpoint that doesn't exist.
        ValueError: If it can't be read, or a process doesn't see what the main one does.
    """
    found = None
    with together():
        if is_main_process():
            found = (
                _newest_readable(find_checkpoints(work_dir), logger)
                if resume is True
                else (Path(str(resume)), read_checkpoint(Path(str(resume))))
            )
    choice = [None if found is None else (found[0].name, found[1]["meta"])]
    broadcast_object_list(choice)
    with together():
        if choice[0] is not None and not is_main_process():
            name, meta = choice[0]
            found = _read_like_main(work_dir / name if resume is True else Path(str(resume)), meta)
    return found


@contextmanager
def together() -> Iterator[None]:
    """Run the body in all processes; if one fails in it, all do, rather than wait for it forever.

    Raises:
        ValueError: If another process has failed.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    message = None if failed is None else f"{type(failed).__name__}: {failed}"
    messages = all_gather_object(message)
    if failed is not None:
        raise failed
    for rank, other in enumerate(messages):
        if other is not None:
            raise ValueError(f"process {rank} can't go on: {other}")


def point_to_newest(work_dir: Path) -> None:
    """Make ``last_checkpoint`` name the newest checkpoint in a folder; without one, remove it."""
    checkpoints = find_checkpoints(work_dir)
    if checkpoints:
        atomic_write_text(work_dir / LAST_CHECKPOINT, checkpoints[0].name)
    else:
        (work_dir / LAST_CHECKPOINT).unlink(missing_ok=True)


def _newest_readable(paths: Sequence[Path], logger: Logger) -> tuple[Path, dict[str, Any]] | None:
    for path in paths:
        try:
            return path, read_checkpoint(path)
        except (ValueError, FileNotFoundError) as error:
            logger.warning(f"{error}; falling back to the checkpoint before it")
    return None


def _read_like_main(path: Path, meta: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Read what the main process has read and verified."""
    advice = (
        "the main process resumes from its own; give a --work-dir on a file system that all nodes "
        "share, or copy that checkpoint to every node"
    )
    try:
        state = read_checkpoint(path, verify=False)
    except FileNotFoundError as error:
        raise ValueError(f"{error}: {advice}") from error
    if state["meta"] != meta:
        raise ValueError(f"{path} is here the checkpoint of another run: {advice}")
    return path, state


def _announce(path: Path, *, max_keep: int) -> None:
    atomic_write_text(path.parent / LAST_CHECKPOINT, path.name)
    for old in find_checkpoints(path.parent)[max_keep:]:
        if old.is_dir():
            remove_folder(old)
        else:
            old.unlink(missing_ok=True)


def _check_shards(path: Path, sizes: Mapping[str, int]) -> None:
    """Compare the shards' files with those that were written."""
    found = {name: file.stat().st_size for name, file in _files(path / SHARDS_NAME).items()}
    wrong = sorted(name for name, size in sizes.items() if found.get(name) != size)
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"checkpoint {path} can't be read: {len(wrong)} of its {len(sizes)} shard files are "
            f"missing or torn, such as {name} ({sizes[name]} bytes written, "
            f"{found.get(name, 'none')} found)"
        )


def _files(folder: Path) -> dict[str, Path]:
    return {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
