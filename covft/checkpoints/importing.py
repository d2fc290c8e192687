"""Loading a public checkpoint of a whole MLLM, or of parts of it, into a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from covft.checkpoints.layouts import LAYOUTS, Layout, detect_layout
from covft.checkpoints.layouts.base import part_of, tied_names
from covft.checkpoints.published_config import check_published_config
from covft.checkpoints.trainable import WEIGHTS_NAME, check_same_parameters, check_tied, copy_into
from covft.models.mllm import MLLM
from covft.registry import nearest, shortened
from covft.weights.files import open_tensors, public_file

Shapes = Mapping[str, Sequence[int]]
#: An image's first layer in a file of CLIP, SigLIP, InternViT or DINO.
_ENCODER = re.compile(r"(vision_model\.)?embeddings\.patch_embeddings?\.")


@dataclass(frozen=True)
class Imported:
    """What came from a file.

    Attributes:
        layout: Name of the layout that the file is in.
        names: The model's parameters that were loaded.
        kept: Parts of the model that the file doesn't hold; they stay as they were.
    """

    layout: str
    names: tuple[str, ...]
    kept: tuple[str, ...]


def import_checkpoint(model: MLLM, path: str | Path, layout: str | None = None) -> Imported:
    """Load a public checkpoint.

    Parts that the file holds are loaded whole, or nothing is: names and shapes are compared before
    the model is changed. Where the file's encoder is a plain one, and the model's VFT method adds
    to it, the method starts from the file's encoder.

    Args:
        model: The model to change in place.
        path: A folder or file, see :func:`~covft.weights.files.open_tensors`. A config.json
            beside the weights is compared with the model.
        layout: A name in :data:`~covft.checkpoints.layouts.LAYOUTS`; by default it is detected.

    Raises:
        FileNotFoundError: If there are no weights.
        ValueError: If they are in no known layout, or for another model; it lists what is missing,
            unexpected or of another shape, and says what to change.
    """
    state = open_tensors(path)
    chosen = _layout(state, layout, source=str(path))
    try:
        check_published_config(model, path)
        ours = chosen.to_ours(state, model)
    except ValueError as error:
        raise ValueError(f"{path} (layout '{chosen.name}'): {error}") from error
    source = f"{path} (layout '{chosen.name}')"
    found = {part_of(name) for name in ours}
    if "llm" in found:
        _check_not_quantised(model, source=source)
    own = model.state_dict()
    expected = _expected(model, own, found | (chosen.parts - chosen.optional), ours.keys())
    _check_same({name: value.shape for name, value in ours.items()}, expected, source=source)
    _check_output_layer(model, ours, source=source)
    check_tied(own, ours, source=source)
    copy_into(own, ours)
    kept = sorted({part_of(name) for name in own} - found)
    return Imported(chosen.name, tuple(sorted(ours)), tuple(kept))


def is_public(path: Path) -> bool:
    """Tell whether ``path`` is a public checkpoint, rather than weights of this project.

    A pretrained LLM or encoder alone is one too; :func:`import_checkpoint` says where to name it.

    Raises:
        ValueError: If it is a file that can't be read.
    """
    if path.is_dir():
        return not (path / WEIGHTS_NAME).is_file() and public_file(path) is not None
    if not path.is_file():
        return False
    names = open_tensors(path)
    return detect_layout(names) is not None or _part_alone(names) is not None


def _layout(names: Collection[str], wanted: str | None, *, source: str) -> Layout:
    detected = detect_layout(names)
    if wanted is not None and wanted not in LAYOUTS:
        raise ValueError(f"no layout '{wanted}'; {nearest(wanted, LAYOUTS)}")
    if detected is None:
        alone = _part_alone(names)
        if alone is not None:
            part, key = alone
            raise ValueError(
                f"{source} holds {part} alone, not a whole MLLM; instead of load_from, set "
                f"{key} to that folder"
            )
        lora = any("lora_" in name for name in names)
        raise ValueError(
            f"{source} is in none of the layouts {', '.join(LAYOUTS)}; it holds "
            f"{len(names)} tensors: {shortened(sorted(names))}"
            + (". These are LoRA's factors: merge them with the tool that wrote them" * lora)
        )
    if wanted is not None and wanted != detected.name and not LAYOUTS[wanted].detect(names):
        raise ValueError(
            f"{source} isn't in layout '{wanted}' ({LAYOUTS[wanted].holds}), but in "
            f"'{detected.name}' ({detected.holds}); leave the layout out to have it detected"
        )
    return LAYOUTS[wanted] if wanted else detected


def _part_alone(names: Collection[str]) -> tuple[str, str] | None:
    """Return what pretrained part a file holds and the config's key for it, or None."""
    if any(n.startswith("model.layers.") for n in names) and any(
        n.startswith("model.embed_tokens.") for n in names
    ):
        return "an LLM", "model.llm.weights"
    if any(_ENCODER.match(name) for name in names):
        return "a vision encoder", "model.vision.backbone.weights"
    return None


def _expected(
    model: MLLM, own: Mapping[str, Tensor], parts: Collection[str], given: Collection[str]
) -> dict[str, Sequence[int]]:
    """Return the shapes that a file has to hold for some parts of the model."""
    # Updates of an LLM with LoRA start at zero, whatever weights they are added to.
    left_out = {n for n in own if n.startswith("llm.") and n.endswith((".lora_a", ".lora_b"))}
    left_out |= tied_names(model)
    return {
        name: value.shape
        for name, value in own.items()
        if part_of(name) in parts and (name in given or name not in left_out)
    }


def _check_not_quantised(model: MLLM, *, source: str) -> None:
    if any(getattr(p, "quant_state", None) is not None for p in model.llm.parameters()):
        raise ValueError(
            f"{source} holds an LLM, but the model's is quantised, and its 4-bit weights can't be "
            "replaced; set model.llm.quantization=None, or save the file's LLM as a folder of its "
            "own and name that in model.llm.weights"
        )


def _check_same(found: Shapes, expected: Shapes, *, source: str) -> None:
    try:
        check_same_parameters(found, expected, source=source)
    except ValueError as error:
        causes = "".join(f"Likely cause: {cause}.\n" for cause in _causes(found, expected))
        raise ValueError(f"{causes}{error}") from None


def _causes(found: Shapes, expected: Shapes) -> Iterator[str]:
    """Say in words what differences of names and shapes come from."""
    embeddings = "llm.model.model.embed_tokens.weight"
    if embeddings in found and embeddings in expected:
        (rows, width), (own_rows, own_width) = found[embeddings], expected[embeddings]
        if width != own_width:
            yield (
                f"the file's LLM is {width} wide, the model's {own_width}: another LLM, such as "
                "13B instead of 7B; change model.llm"
            )
        elif rows != own_rows:
            yield (
                f"the file's vocabulary has {rows} tokens, the model's {own_rows}; take the file's "
                f"LLM and tokenizer in model.llm (vocab_size={rows} in its arch)"
            )
    kinds, own_kinds = _attention(found), _attention(expected)
    if kinds and own_kinds and kinds != own_kinds:
        yield (
            f"the file's LLM has {kinds} attention projections, the model's {own_kinds} (Llama and "
            "Qwen2: separate, Phi-3: qkv_proj, InternLM2: wqkv); change model.llm"
        )
    layers, own_layers = _layers(found), _layers(expected)
    if layers and own_layers and layers != own_layers:
        yield f"the file's LLM has {layers} layers, the model's {own_layers}; change model.llm"


def _attention(names: Collection[str]) -> str:
    for kind, leaf in (
        ("separate", ".self_attn.q_proj.weight"),
        ("fused (qkv_proj)", ".self_attn.qkv_proj.weight"),
        ("fused (wqkv)", ".attention.wqkv.weight"),
    ):
        if any(name.startswith("llm.") and name.endswith(leaf) for name in names):
            return kind
    return ""


def _layers(names: Collection[str]) -> int:
    matches = (re.match(r"llm\.model\.model\.layers\.(\d+)\.", name) for name in names)
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def _check_output_layer(model: MLLM, ours: Mapping[str, Tensor], *, source: str) -> None:
    """Refuse an output layer of its own for a model that ties it to the embeddings."""
    embeddings = ours.get("llm.model.model.embed_tokens.weight")
    for name in tied_names(model) & ours.keys():
        if embeddings is not None and not ours[name].equal(embeddings):
            raise ValueError(
                f"{source} has an output layer of its own, which the model's LLM ties to the "
                "embeddings; set tie_word_embeddings=False in model.llm.arch"
            )
