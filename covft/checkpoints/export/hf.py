"""``--to hf``: any method, as a folder that transformers loads with the code shipped in it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from covft.checkpoints.export.bare_config import bare_config, part_modules
from covft.checkpoints.export.bundle import bundle
from covft.checkpoints.export.folder import (
    UnverifiedExportError,
    write_json,
    write_tokenizer,
    write_weights,
)
from covft.checkpoints.export.probe import QUESTION, Probe, compare, probe_image
from covft.checkpoints.export.shipped.processing_covft import (
    CONTEXT_FOLDER,
    PROCESSOR_CONFIG,
    CoVFTProcessor,
)
from covft.checkpoints.export.source import Source, compute_dtype
from covft.models.mllm import MLLM

_SHIPPED = "covft.checkpoints.export.shipped"
_MODEL = "modeling_covft.CoVFTForConditionalGeneration"


def write(source: Source, folder: Path) -> None:
    """Write the run's model, its processor and their code into a folder."""
    model, spec = source.model, source.run.spec
    state = source.state()
    config = {
        "architectures": [_MODEL.rpartition(".")[2]],
        "auto_map": {
            "AutoConfig": "configuration_covft.CoVFTConfig",
            "AutoModel": _MODEL,
            "AutoModelForImageTextToText": _MODEL,
        },
        "model_type": "covft",
        "dtype": str(compute_dtype(state)).removeprefix("torch."),
        "tie_word_embeddings": False,  # of this level; the LLM has its own
        "model": bare_config(model, source.model_cfg),
    }
    write_tokenizer(folder, spec.tokenizer)
    if spec.context_tokenizer is not None:
        write_tokenizer(folder / CONTEXT_FOLDER, spec.context_tokenizer)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", source.generation_config())
    write_weights(folder, {f"mllm.{name}": value for name, value in state.items()})
    processor = CoVFTProcessor(spec, resize=source.run.resize)
    write_json(folder / PROCESSOR_CONFIG, processor.to_dict())
    for name, text in code(model).items():
        (folder / name).write_text(text, encoding="utf-8")


def code(model: MLLM) -> dict[str, str]:
    """Return the files that a model's folder needs, by name."""
    roots = [f"{_SHIPPED}.{name}_covft" for name in ("modeling", "configuration", "processing")]
    return bundle(roots, also={roots[0]: part_modules(model)})


def verify(folder: Path, probe: Probe) -> float:
    """Compare the folder's processor and model with the run.

    Args:
        folder: What :func:`write` wrote.
        probe: The run's answer.

    Raises:
        UnverifiedExportError: If inputs differ, or logits are no numbers.
    """
    importlib.invalidate_caches()
    processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(text=f"<image>\n{QUESTION}", images=probe_image())
    for name, value in inputs.items():
        if not torch.equal(value, probe.batch[name]):
            raise UnverifiedExportError(f"the exported processor gives other {name} than the run.")
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        found = model.eval().float()(**inputs).logits[0]
    return compare(probe.logits, found, loader="AutoModelForImageTextToText")
