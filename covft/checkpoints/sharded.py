"""Checkpoints that are folders: a file of what all processes share, and the shards of each.

The shards of FSDP2 are torch's distributed checkpoints (``torch.distributed.checkpoint``): every
tensor under one key, from which any number of processes can read its parts. Their ``.metadata`` is
a pickle, so that they are to be read from places that are trusted.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

#: In a checkpoint's folder: what isn't sharded.
STATE_NAME = "state.pth"
#: In a checkpoint's folder: the folder that the engine writes its shards into.
SHARDS_NAME = "shards"
_METADATA_NAME = ".metadata"
_WEIGHT, _OPTIMIZER = "model.", "optimizer."


def is_sharded(path: Path) -> bool:
    """Return whether ``path`` is a sharded checkpoint."""
    return (path / STATE_NAME).is_file()


def weight_key(name: str) -> str:
    """Return the key of a model's parameter or buffer."""
    return f"{_WEIGHT}{name}"


def optimizer_key(name: str, entry: str) -> str:
    """Return the key of an entry of the optimizer's state (``exp_avg``) for a parameter."""
    return f"{_OPTIMIZER}{name}.{entry}"


def save_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write tensors, of a DTensor this process's part; all processes take part.

    Args:
        tensors: By key, the same keys on all processes.
        folder: Where every process adds its file.
    """
    distributed_checkpoint.save(
        dict(tensors), storage_writer=distributed_checkpoint.FileSystemWriter(folder)
    )


def load_tensors(tensors: Mapping[str, Tensor], folder: Path, *, alone: bool = False) -> None:
    """Read tensors in place, of a DTensor this process's part.

    Args:
        tensors: By key, each with the shape that was written.
        folder: What :func:`save_tensors` has written, with however many processes.
        alone: Whether this process reads by itself; otherwise all take part, with the same keys.
    """
    with warnings.catch_warnings():
        # Of one process it says that it assumes one process.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        distributed_checkpoint.load(
            dict(tensors),
            storage_reader=distributed_checkpoint.FileSystemReader(folder),
            no_dist=alone,
        )


def stored_tensors(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return shape and type of every tensor in the shards of :func:`save_tensors`."""
    metadata = distributed_checkpoint.FileSystemReader(folder).read_metadata()
    return {
        key: (value.size, value.properties.dtype)
        for key, value in metadata.state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata)
    }


def stored_optimizer_entries(folder: Path) -> dict[str, list[str]]:
    """Return the entries of the optimizer's state that the shards hold for each parameter."""
    entries: dict[str, list[str]] = {}
    for key in stored_tensors(folder):
        if key.startswith(_OPTIMIZER):
            name, _, entry = key.removeprefix(_OPTIMIZER).rpartition(".")
            entries.setdefault(name, []).append(entry)
    return entries


def read_sharded_weights(path: Path) -> dict[str, Tensor]:
    """Return the trained weights that a sharded checkpoint holds, whole and on the CPU.

    Args:
        path: The checkpoint's folder.

    Raises:
        ValueError: If its shards are in an engine's own format.
    """
    shards = path / SHARDS_NAME
    if not (shards / _METADATA_NAME).is_file():
        state: dict[str, Any] = torch.load(path / STATE_NAME, map_location="cpu", weights_only=True)
        engine = state.get("meta", {}).get("strategy", "another engine")
        raise ValueError(
            f"{path} holds shards of strategy '{engine}', which that alone can read. Resume the "
            "run with it (--resume) to its end, which writes weights.safetensors, and start from "
            "that; or have it write whole checkpoints (checkpoint.sharded=False), if it can"
        )
    tensors = {
        key: torch.empty(size, dtype=dtype)
        for key, (size, dtype) in stored_tensors(shards).items()
        if key.startswith(_WEIGHT)
    }
    load_tensors(tensors, shards, alone=True)
    return {key.removeprefix(_WEIGHT): value for key, value in tensors.items()}
