"""Read a checkpoint folder: its config.json and its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from covft.models.vision.layout import is_beside_vision

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_SHARDED = tuple(f"{name}.index.json" for name in _SINGLE)


def locate(weights: str) -> Path:
    """Return the folder of ``weights``: an existing folder, or a hub id that is resolved."""
    folder = Path(weights).expanduser()
    if folder.is_dir():
        return folder
    from covft.weights import resolve

    return resolve(weights)


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return the folder's config.json, or None where there is none."""
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read every tensor that may belong to a vision encoder; other parts are left on the disk.

    Raises:
        ValueError: If the folder holds no checkpoint file, or an index names a missing one.
    """
    tensors: dict[str, Tensor] = {}
    for path in _files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                keys = [key for key in file.keys() if not is_beside_vision(key)]  # noqa: SIM118
                tensors.update({key: file.get_tensor(key) for key in keys})
        else:
            shard = torch.load(path, map_location="cpu", weights_only=True)
            tensors.update({k: v for k, v in shard.items() if not is_beside_vision(k)})
    return tensors


def _files(folder: Path) -> list[Path]:
    for single, sharded in zip(_SINGLE, _SHARDED, strict=True):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / sharded).is_file():
            index = json.loads((folder / sharded).read_text(encoding="utf-8"))
            files = [
                folder / name
                for name in sorted(
                    {f for key, f in index["weight_map"].items() if not is_beside_vision(key)}
                )
            ]
            missing = [path.name for path in files if not path.is_file()]
            if missing:
                raise ValueError(
                    f"{folder / sharded} names files that aren't there: {', '.join(missing)}; "
                    "download the checkpoint again"
                )
            return files
    raise ValueError(
        f"no weights in '{folder}': expected one of {', '.join(_SINGLE + _SHARDED)}; "
        "set the backbone's weights to a checkpoint folder or a hub id"
    )
