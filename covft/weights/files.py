"""Files of weights in the public formats, opened without reading them whole."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

#: What a folder's weights are called on the hub, the first that is there counts.
HUB_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
#: The same, with what training codes write.
FILES = (
    *HUB_FILES,
    "mm_projector.bin",
    "mp_rank_00_model_states.pt",  # DeepSpeed's ZeRO-1 and ZeRO-2
)
#: Keys under which training tools put the weights in a file that holds more.
_WRAPPERS = ("state_dict", "module", "model")
#: DeepSpeed's ZeRO-3: one file per process, with a part of every tensor elsewhere.
_PARTITIONS = "zero_pp_rank_*_model_states.pt"
_SHARD = re.compile(r".*-\d+-of-(\d+)\.(safetensors|bin)")


def open_tensors(
    path: str | Path, *, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """Open the tensors of a checkpoint.

    The tensors are mapped from the files, page by page as they are used, so that copying them into
    a model takes no second model's memory. Only PyTorch's format before 1.6 is read whole.

    Args:
        path: A folder with safetensors or PyTorch files (whole, or in shards with their index), or
            a single such file, whose weights may be under ``state_dict`` or, as DeepSpeed has them,
            under ``module``.
        wanted: Tells by a tensor's name whether to open it. Shards in which none is wanted needn't
            be there.

    Raises:
        FileNotFoundError: If there is no such path, or the folder holds no weights.
        ValueError: If a shard is missing, a file is broken or holds more than weights, or the
            weights are ZeRO-3's partitions.
    """
    path = Path(path).expanduser()
    if path.is_file():
        shard = _SHARD.fullmatch(path.name)
        if shard and int(shard[1]) > 1:
            raise ValueError(f"{path} is one of {shard[1]} shards; name its folder instead")
        if path.match(_PARTITIONS):
            raise _partitioned(path)
        return _open_file(path, wanted)
    if not path.is_dir():
        raise FileNotFoundError(f"no weights at '{path}'")
    name = public_file(path)
    if name is None:
        if any(path.glob(_PARTITIONS)):
            raise _partitioned(path)
        raise FileNotFoundError(f"no weights in '{path}': expected one of {', '.join(FILES)}")
    file = path / name
    return _open_shards(file, wanted) if file.suffix == ".json" else _open_file(file, wanted)


def public_file(folder: Path, names: Sequence[str] = FILES) -> str | None:
    """Return the first of ``names`` that is a file in a folder, or None if there is none."""
    return next((name for name in names if (folder / name).is_file()), None)


def _partitioned(path: Path) -> ValueError:
    return ValueError(
        f"{path} holds partitions of DeepSpeed's ZeRO-3, not whole weights; consolidate them with "
        "the zero_to_fp32.py that DeepSpeed wrote beside them, and name its output instead"
    )


def _open_shards(index: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    weight_map: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    places = {name: shard for name, shard in weight_map.items() if wanted(name)}
    shards = sorted(set(places.values()))
    absent = [name for name in shards if not (index.parent / name).is_file()]
    if absent:
        raise ValueError(
            f"{index} names {len(absent)} of {len(shards)} shards that aren't there: "
            f"{', '.join(absent)}; download the checkpoint again"
        )
    tensors: dict[str, Tensor] = {}
    for name in shards:
        tensors.update(_open_file(index.parent / name, wanted))
    lost = sorted(places.keys() - tensors.keys())
    if lost:
        raise ValueError(
            f"{len(lost)} tensors that {index} names aren't in their shards, such as {lost[0]}; "
            "download the checkpoint again"
        )
    return tensors


def _open_file(file: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                names = [name for name in opened.keys() if wanted(name)]  # noqa: SIM118
                return {name: opened.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{file} is broken ({error}); download it again") from error
    try:
        content = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{file} is broken, or holds Python objects beside its weights, which aren't run here: "
            "save its 'state_dict' alone with the tool that wrote it "
            f"({str(error).splitlines()[0]})"
        ) from error
    return {name: value for name, value in _weights(content, file).items() if wanted(name)}


def _weights(content: Any, file: Path) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            return _weights(content[key], file)
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{file} holds no state dict: expected a dict of tensors by name")
    return dict(content)
