"""The part of a model that training changes: its state dict, and files of weights.

Frozen parameters are left out: they come from their pretrained source again.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from covft.atomic import atomic_write
from covft.checkpoints.sharded import is_sharded, read_sharded_weights

WEIGHTS_NAME = "weights.safetensors"
#: How many names of each kind an error lists.
_SHOWN = 10


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside an engine's wrapper, or the model itself."""
    # DistributedDataParallel and DeepSpeed's engine both call it so.
    inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) else model


def trainable_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return what training can change: trainable parameters and persistent buffers.

    The tensors are the model's own, not copies. Extra entries that quantised layers add beside
    their frozen weights are left out like the weights.
    """
    model = unwrapped(model)
    wanted = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
    }
    wanted |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return {name: value for name, value in model.state_dict().items() if name in wanted}


def save_weights(model: nn.Module, path: Path, *, metadata: Mapping[str, str]) -> None:
    """Write the trainable part of ``model`` as a safetensors file, atomically.

    Args:
        model: The model; its trainable parameters and buffers are written.
        path: The file.
        metadata: Texts to put in the file's header.
    """
    # safetensors refuses tensors that share memory, as tied weights do.
    tensors = {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in trainable_state_dict(model).items()
    }
    save_tensors(tensors, path, metadata=metadata)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str]) -> None:
    """Write such a part of a model, of which no two tensors share memory."""
    header = {"format": "pt", **metadata}
    atomic_write(path, lambda partial: save_file(dict(tensors), partial, metadata=header))


def trained_config(path: Path) -> str:
    """Return the text of the config that a file of weights was trained with; "" if it has none.

    Args:
        path: A file of :func:`save_weights`, whose ``metadata`` holds the text as "config".
    """
    with safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
    return metadata.get("config", "")


def load_weights(model: nn.Module, path: str | Path) -> list[str]:
    """Load a file of weights into a model that holds at least these parameters.

    This is how a stage starts from the one before. What the file doesn't hold keeps its value; it
    was frozen when the file was written, and comes from its pretrained source.

    Args:
        model: The model to change in place.
        path: A safetensors file, a checkpoint (one of FSDP2's shards too), or the folder of a
            finished run.

    Returns:
        The names that were loaded.

    Raises:
        FileNotFoundError: If there is no such file, or the folder holds no finished run.
        ValueError: If the file holds a name that the model doesn't, or another shape, or is an
            engine's own.
    """
    file = _weights_file(Path(path))
    if is_sharded(file):
        loaded = read_sharded_weights(file)
    elif file.suffix == ".safetensors":
        loaded = load_file(file)
    else:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
            raise ValueError(f"{file} is no checkpoint of this project: it has no 'state_dict'")
        loaded = checkpoint["state_dict"]
    own = unwrapped(model).state_dict()
    check_same_parameters(
        {name: value.shape for name, value in loaded.items()},
        {name: value.shape for name, value in own.items() if name in loaded},
        source=str(file),
    )
    check_tied(own, loaded, source=str(file))
    copy_into(own, loaded)
    return sorted(loaded)


def check_tied(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor], *, source: str) -> None:
    """Refuse different values for names that are one tensor in the model: the last would win."""
    first: dict[tuple[int, int], str] = {}
    for name, value in loaded.items():
        place = (own[name].data_ptr(), own[name].numel())
        other = first.setdefault(place, name)
        if value.numel() and not torch.equal(value, loaded[other]):
            raise ValueError(
                f"{source} holds different values for {other} and {name}, which the model shares; "
                "build the model without sharing (such as vft.shared_cve), as the file's was"
            )


def trainable_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of :func:`trainable_state_dict`."""
    return {name: tuple(value.shape) for name, value in trainable_state_dict(model).items()}


def copy_into(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    """Copy ``loaded`` into the tensors of the same names in a model's state dict."""
    with torch.no_grad():
        for name, value in loaded.items():
            own[name].copy_(value)


def check_same_parameters(
    found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], *, source: str
) -> None:
    """Compare names and shapes in a file with the model's.

    Raises:
        ValueError: If they differ; it lists what is missing in the file, what the model doesn't
            have, and what has another shape.
    """
    shapes = [
        f"{name}: {tuple(found[name])} in the file, {tuple(shape)} in the model"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    problems = [
        *_listing("missing in the file", expected.keys() - found.keys()),
        *_listing("not in the model", found.keys() - expected.keys()),
        *_listing("of another shape", shapes),
    ]
    if problems:
        listed = "\n".join(problems)
        raise ValueError(
            f"{source} doesn't fit the model:\n{listed}\nCheck that the config's 'model' "
            "(architecture, VFT method, what is frozen) is the one the file was trained with."
        )


def _listing(title: str, names: Iterable[str]) -> list[str]:
    names = sorted(names)
    if not names:
        return []
    rest = [f"  ... and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return [f"{len(names)} {title}:", *(f"  {name}" for name in names[:_SHOWN]), *rest]


def _weights_file(path: Path) -> Path:
    if is_sharded(path):
        return path
    if path.is_dir():
        path = path / WEIGHTS_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} doesn't exist: the run isn't finished. Name one of its checkpoints "
                "(iter_*) to start from it anyway."
            )
    if not path.is_file():
        raise FileNotFoundError(f"no weights at '{path}'")
    if path.suffix != ".safetensors" and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is neither a safetensors file nor a checkpoint of this project")
    return path
