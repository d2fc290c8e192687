"""The files of CoVFT's public code (weeknan/CoVFT): LLaVA's, with a tuned vision tower and BERT.

The files' config.json says nothing of the method; :func:`infer_method` reads it from the shapes.
What shapes don't tell is the config's: LoRA's alpha, CVE's activation, dense or sparse routing.

CoVFT's ablations, which the public code doesn't have, are written with the names of what they have
(:meth:`~covft.vft.comoe.CoMoE.public_state_dict`), so that they can be read again here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from covft.checkpoints.layouts.base import (
    Layout,
    part_of,
    plain_encoder_state,
    plain_llm_state,
)
from covft.checkpoints.layouts.encoder import read_encoder
from covft.checkpoints.layouts.llava import LLAVA, LLAVA_PROJECTORS
from covft.checkpoints.layouts.tuned import TUNED
from covft.models.mllm import MLLM
from covft.models.text_encoder import TextEncoder
from covft.models.vision.clip import CLIP
from covft.models.vision.siglip import SigLIP

_EXPERT = re.compile(r"(?:.*\.)?encoder\.layers\.(\d+)\.mlp\.experts\.(\d+)\.0\.weight")
_GATE = re.compile(r".*\.mlp\.gate\.(weight|bias)")
_LORA = re.compile(r"(?:.*\.)?encoder\.layers\.\d+\.self_attn\.\w+\.lora_down\.weight")
_PROMPTS = re.compile(r"(?:.*\.)?prompt_embeddings\.\d+")
_TEXT = "text_resblock.ln.weight"

Shapes = Mapping[str, Sequence[int]]


def infer_method(shapes: Shapes) -> dict[str, Any]:
    """Read from a file's names and shapes which method its vision encoder was tuned by.

    Args:
        shapes: Shape of each tensor by its public name, whatever its prefix.

    Returns:
        A ``vft`` config: ``type`` "CoVFT" with ``num_experts``, ``first_block`` and ``last_block``
        (and ``context`` or ``routing`` where they aren't the default), "LoRA" with ``rank``, or
        "VPT" with ``num_prompts``. Empty for a plain encoder: frozen, or tuned by Full or BitFit.

    Raises:
        ValueError: If the layers differ from each other, or the blocks with experts have gaps.
    """
    experts = [match for name in shapes if (match := _EXPERT.fullmatch(name))]
    if experts:
        return _infer_covft(shapes, experts)
    ranks = {shape[0] for name, shape in shapes.items() if _LORA.fullmatch(name)}
    if ranks:
        return {"type": "LoRA", "rank": _only(ranks, "LoRA ranks")}
    prompts = {shape[-2] for name, shape in shapes.items() if _PROMPTS.fullmatch(name)}
    return {"type": "VPT", "num_prompts": _only(prompts, "numbers of prompts")} if prompts else {}


def _infer_covft(shapes: Shapes, experts: list[re.Match[str]]) -> dict[str, Any]:
    of_layer: dict[int, set[int]] = {}
    for match in experts:
        of_layer.setdefault(int(match[1]), set()).add(int(match[2]))
    first, last = min(of_layer), max(of_layer)
    if set(of_layer) != set(range(first, last + 1)):
        raise ValueError(f"blocks with experts aren't contiguous: {sorted(of_layer)}")
    method = {
        "type": "CoVFT",
        "num_experts": _only({len(found) for found in of_layer.values()}, "numbers of experts"),
        "first_block": first,
        "last_block": last,
    }
    return {**method, **_infer_router(shapes, width=shapes[experts[0][0]][1])}


def _infer_router(shapes: Shapes, *, width: int) -> dict[str, Any]:
    """Return how the experts are routed, where it isn't by CVE; ``width`` is the encoder's D."""
    gates = {match[1]: shapes[name] for name in shapes if (match := _GATE.fullmatch(name))}
    if any(name.endswith(_TEXT) for name in shapes):
        return {}
    if not gates:
        return {"routing": "uniform"}
    if "weight" not in gates:
        return {"context": "none"}
    reads = gates["weight"][1]
    if reads == width:
        return {"context": "image-only"}
    text = context_width(shapes)
    return {"context": "concat" if text is not None and reads == width + text else "text-only"}


def _only(found: set[int], what: str) -> int:
    if len(found) != 1:
        raise ValueError(f"the file's layers have different {what}: {sorted(found)}")
    return found.pop()


def context_width(shapes: Shapes) -> int | None:
    """Return the width C of a file's context, or None if it holds neither CVE nor BERT."""
    for name, shape in shapes.items():
        if name.endswith((_TEXT, "context_embedding_model.embeddings.word_embeddings.weight")):
            return shape[-1]
    return None


class _CoVFTLayout(Layout):
    """LLaVA's layout, with what the methods put into the vision tower."""

    def to_ours(self, state: Mapping[str, Tensor], model: MLLM) -> dict[str, Tensor]:
        """See the base; the file's method is compared with the model's."""
        _check_encoder(model)
        _check_method({name: tuple(value.shape) for name, value in state.items()}, model)
        return super().to_ours(state, model)

    def from_ours(self, state: Mapping[str, Tensor] | None, model: MLLM) -> dict[str, Tensor]:
        """See the base; ``state`` has the model's own names, the method's included."""
        _check_encoder(model)
        if not isinstance(model.text_encoder, (TextEncoder, type(None))):
            raise ValueError(
                f"layout '{self.name}' holds BERT as context encoder, but the model's is "
                f"{type(model.text_encoder).__name__}"
            )
        return super().from_ours(state, model)

    def state_dict(self, model: MLLM) -> dict[str, Tensor]:
        """Return the model's own state dict, with the LLM as a plain one."""
        own = {n: value for n, value in model.state_dict().items() if part_of(n) != "llm"}
        return {**own, **plain_llm_state(model)}

    def _read_vision(self, part: Mapping[str, Tensor], model: MLLM) -> dict[str, Tensor]:
        method = infer_method({name: value.shape for name, value in part.items()})
        if not method:
            return read_encoder(part, model.vision)
        tuned = TUNED[method["type"]].read(part, model.vision.backbone)
        return {f"vision.backbone.{name}": tensor for name, tensor in tuned.items()}

    def _read_other(
        self, prefix: str, part: Mapping[str, Tensor], model: MLLM
    ) -> dict[str, Tensor]:
        # Their code saves BERT with the methods that don't read it, too.
        if prefix == "text_encoder.model." and model.text_encoder is None:
            return {}
        return super()._read_other(prefix, part, model)

    def _write_vision(self, state: Mapping[str, Tensor], model: MLLM) -> dict[str, Tensor]:
        own = plain_encoder_state(state, layout=self.name)
        backbone, kind = model.vision.backbone, type(model.vision.vft).__name__
        if kind in TUNED:
            public = TUNED[kind].write(own, backbone)
        else:
            public = {
                f"vision_tower.{name}": value
                for name, value in backbone.export_state_dict(own).items()
            }
        return {self.prefixes["vision."][0] + name: value for name, value in public.items()}


def _check_encoder(model: MLLM) -> None:
    if not isinstance(model.vision.backbone, (CLIP, SigLIP)):
        raise ValueError(
            "layout 'covft' holds CLIP (or SigLIP, which has the same names), but the model's "
            f"encoder is {type(model.vision.backbone).__name__}"
        )


def _check_method(shapes: Shapes, model: MLLM) -> None:
    """Compare the file's method with the model's, by what each shows in the public layout."""
    found = infer_method(shapes)
    if not found:
        return
    kind = type(model.vision.vft).__name__
    own: dict[str, Any] = {}
    if kind in TUNED:
        written = TUNED[kind].write(model.vision.backbone.state_dict(), model.vision.backbone)
        own_shapes = {name: tuple(value.shape) for name, value in written.items()}
        if model.text_encoder is not None:
            name = "context_embedding_model.embeddings.word_embeddings.weight"
            own_shapes[name] = (0, model.text_encoder.hidden_dim)
        own = infer_method(own_shapes)
    if own != found:
        config = ", ".join(f"{name}={value!r}" for name, value in found.items())
        raise ValueError(
            f"the file's encoder is tuned by {found['type']}; set model.vision.vft to "
            f"dict({config}) (the config's is {own or kind})"
        )
    width = context_width(shapes)
    encoder = model.text_encoder
    if width is not None and encoder is not None and width != encoder.hidden_dim:
        raise ValueError(
            f"the file's context is {width} wide, that of model.text_encoder {encoder.hidden_dim}; "
            "set it to the encoder that the file was trained with (768: bert-base-uncased)"
        )


COVFT = _CoVFTLayout(
    name="covft",
    holds="CoVFT's public code (weeknan/CoVFT)",
    prefixes={
        **LLAVA.prefixes,
        "vision.": ("model.vision_tower.",),
        "text_encoder.model.": ("model.context_embedding_model.",),
    },
    projectors=LLAVA_PROJECTORS,
    marks=(
        r"model\.(context_embedding_model|vision_tower\.prompt_embeddings)\."
        r"|model\.vision_tower\..*\.(mlp\.experts\.\d+|lora_down)\.",
    ),
    # BERT was frozen.
    optional=frozenset({"text_encoder"}),
    # The last hidden state is read, not the pooler's.
    ignored=(r"model\.context_embedding_model\.pooler\..+",),
)
