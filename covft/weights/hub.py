"""Folders from the Hugging Face hub, kept in the hub's own cache and shared with other tools."""

from __future__ import annotations

import json
import re
from pathlib import Path

from covft.weights.cache import say
from covft.weights.errors import SourceUnreachableError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TEXT_FILES = ["*.json", "*.txt", "*.jinja", "tokenizer*.model", "spiece.model"]
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "spiece.model")
# Subfolders repeat the weights for other runtimes (onnx/, openvino/, original/).
_IGNORED = ["*/*", "consolidated*"]


def is_hub_id(name: str) -> bool:
    """Return whether ``name`` has the form ``org/name``."""
    return _HUB_ID.fullmatch(name) is not None


def find_in_hub_cache(name: str) -> Path | None:
    """Return the folder of an earlier download if it is complete; never asks the network."""
    folder = _local_snapshot(name)
    return folder if folder is not None and _missing(folder) is None else None


def fetch_from_hub(name: str) -> Path:
    """Return the hub's weights, config and tokenizer as a folder, downloading what isn't cached.

    A complete download is used without asking again, so that a change on the hub can't enter a
    comparison half-way.

    Raises:
        SourceUnreachableError: If the hub can't be reached.
        PermissionError: If the repository is gated and access wasn't granted.
        ValueError: If there is no such repository, or it holds no weights.
    """
    cached = find_in_hub_cache(name)
    if cached is not None:
        return cached
    say(f"fetching {name} from the Hugging Face hub")
    folder = _download(name, [*_TEXT_FILES, "*.safetensors"])
    if not any(folder.glob("*.safetensors")):
        # Some repositories (Vicuna 7B v1.5, CLIP ViT-L/14-336) hold PyTorch's older format alone.
        folder = _download(name, [*_TEXT_FILES, "pytorch_model*.bin"])
    problem = _missing(folder)
    if problem is not None:
        raise ValueError(
            f"'{name}' from the Hugging Face hub has no {problem}: either the repository lacks it, "
            f"or its download broke off and there is no connection now (see {folder})"
        )
    say(f"fetched {name}, kept in {folder}")
    return folder


def fetch_text_files(name: str) -> Path:
    """Return the hub's config and tokenizer as a folder, downloading what isn't cached.

    Raises:
        SourceUnreachableError: If the hub can't be reached.
        PermissionError: If the repository is gated and access wasn't granted.
        ValueError: If there is no such repository.
    """
    cached = _local_snapshot(name)
    if cached is not None and any(any(cached.glob(pattern)) for pattern in _TOKENIZER_FILES):
        return cached
    say(f"fetching the tokenizer of {name} from the Hugging Face hub")
    return _download(name, _TEXT_FILES)


def hub_source(folder: Path) -> str | None:
    """Return ``hub: org/name@revision`` if ``folder`` lies in a hub cache."""
    parts = folder.absolute().parts
    if len(parts) < 3 or parts[-2] != "snapshots" or not parts[-3].startswith("models--"):
        return None
    return f"hub: {parts[-3].removeprefix('models--').replace('--', '/', 1)}@{parts[-1]}"


def _local_snapshot(name: str) -> Path | None:
    """Return the folder of an earlier download, complete or not; never asks the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _download(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=_IGNORED))
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"'{name}' is gated: accept its licence at https://huggingface.co/{name}, then "
            f"`hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"'{name}' is neither a folder nor a repository of the Hugging Face hub that you may "
            f"read (a private one needs `hf auth login`)"
        ) from error
    except (
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        errors.HTTPError,
        ConnectionError,
    ) as error:
        raise SourceUnreachableError(str(error).splitlines()[0]) from error


def _missing(folder: Path) -> str | None:
    """Return what a model folder lacks, in words, or None if it is complete."""
    if not (folder / "config.json").is_file():
        return "config.json"
    for single, pattern in (
        ("model.safetensors", "*.safetensors"),
        ("pytorch_model.bin", "pytorch_model*.bin"),
    ):
        if (folder / single).is_file():
            return None
        index = folder / f"{single}.index.json"
        if index.is_file() and any(folder.glob(pattern)):
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            absent = [shard for shard in shards if not (folder / shard).is_file()]
            return f"{', '.join(absent)}, which its index names" if absent else None
    return None if any(folder.glob("*.safetensors")) else "weights (safetensors or PyTorch)"
