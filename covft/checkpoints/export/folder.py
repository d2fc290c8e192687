"""Writing an exported folder: complete or not there."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

#: What transformers writes by default is larger than some file systems and tools take.
SHARD_SIZE = "5GB"
_PROBES = ("a b", "\nWhat is it?", "USER: what? ASSISTANT:", "  two spaces", "é 数")
#: What an AddedToken is, and code before transformers 5 makes it of.
_ADDED_TOKEN = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


class UnverifiedExportError(ValueError):
    """The written folder doesn't give the run's answer."""


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a folder to write in, which takes the name ``out`` once the block has ended.

    Args:
        out: A folder that doesn't exist.

    Raises:
        ValueError: If ``out`` exists; nothing is overwritten.
    """
    if out.exists():
        raise ValueError(f"{out} exists, and nothing is overwritten; name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    # No leading dot: transformers makes a module's name of that of a folder with code. Python keeps
    # what it has imported, so that each folder needs a name of its own.
    partial = out.with_name(f"{out.name}-partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    try:
        yield partial
    except UnverifiedExportError as error:
        kept = out.with_name(f"{out.name}-unverified")
        if kept.exists():
            kept = partial
        else:
            partial.rename(kept)
        raise UnverifiedExportError(f"{error} What was written is kept in {kept}.") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(out)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file as transformers does: indented, UTF-8."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, in shards where they are many."""
    save_torch_state_dict(
        {name: _alone(value.detach()) for name, value in state.items()},
        folder,
        max_shard_size=SHARD_SIZE,
    )


def convert_weights(folder: Path, dtype: torch.dtype) -> None:
    """Convert a written folder's floating-point weights to a type, and say so in its config."""
    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                value = opened.get_tensor(name)
                state[name] = value.to(dtype) if value.is_floating_point() else value
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    write_weights(folder, state)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    (key,) = config.keys() & {"dtype", "torch_dtype"}
    write_json(path, {**config, key: str(dtype).removeprefix("torch.")})


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a tokenizer that gives the same ids once it is read again.

    The slow Llama tokenizers, which LLaVA's and InternVL2's code use, read no tokenizer.json but
    a sentencepiece model, copied where there is one, and take the tokens added to it from
    ``added_tokens_decoder`` in tokenizer_config.json, which transformers 5 writes no more.

    Raises:
        UnverifiedExportError: If it doesn't.
    """
    tokenizer.save_pretrained(folder)
    # transformers leaves out the Llama tokenizers' "legacy", which changes ids.
    legacy = getattr(tokenizer, "legacy", tokenizer.init_kwargs.get("legacy"))
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if legacy is not None:
        config["legacy"] = legacy
    model = _sentencepiece_model(tokenizer)
    if model is not None:
        shutil.copyfile(model, folder / model.name)
        config["added_tokens_decoder"] = {
            str(number): {name: getattr(token, name) for name in _ADDED_TOKEN}
            for number, token in tokenizer.added_tokens_decoder.items()
        }
    write_json(file, config)
    again = AutoTokenizer.from_pretrained(folder)
    for probe in (*_PROBES, " ".join(tokenizer.get_added_vocab())):
        before, now = tokenizer(probe)["input_ids"], again(probe)["input_ids"]
        if list(before) != list(now):
            raise UnverifiedExportError(
                f"the LLM's {type(tokenizer).__name__} gives other ids once it is written and "
                f"read again ({probe!r}: {before}, then {now})."
            )


def _sentencepiece_model(tokenizer: PreTrainedTokenizerBase) -> Path | None:
    named = getattr(tokenizer, "vocab_file", None)
    # A tokenizer that was read from a tokenizer.json may not know of the file beside it.
    for path in (Path(named or ""), Path(tokenizer.name_or_path) / "tokenizer.model"):
        if path.suffix == ".model" and path.is_file():
            return path
    return None


def _alone(value: Tensor) -> Tensor:
    """Return a contiguous tensor that is all of its memory: safetensors refuses parts of one."""
    value = value.contiguous()
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if whole else value.clone()
