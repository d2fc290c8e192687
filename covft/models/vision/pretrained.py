"""Read a checkpoint folder: its config.json and its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from covft.models.vision.layout import is_beside_vision
from covft.weights.files import HUB_FILES, open_tensors, public_file


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
    """Open every tensor that may belong to a vision encoder; other parts are left on the disk.

    Raises:
        ValueError: If the folder holds no checkpoint file, an index names a missing one, or one is
            broken.
    """
    if public_file(folder, HUB_FILES) is None:
        raise ValueError(
            f"no weights in '{folder}': expected model.safetensors, pytorch_model.bin, or one of "
            "them in shards with its .index.json; set the backbone's weights to a checkpoint "
            "folder or a hub id"
        )
    return open_tensors(folder, wanted=lambda name: not is_beside_vision(name))
