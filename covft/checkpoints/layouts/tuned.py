"""Encoders tuned by CoVFT, LoRA and VPT under the names of CoVFT's public code.

Each method's names differ from the plain encoder's in a few places. Those are set aside, the rest
goes through the family's own map, and the parts are put together again.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from covft.models.vision.backbone import VisionBackbone
from covft.vft.comoe import CoMoE
from covft.vft.lora import PROJECTIONS

#: Public names start with this; only VPT's prompts stand beside it.
_TOWER = "vision_tower."


class TunedEncoder(Protocol):
    """A method's names, public ones relative to ``model.vision_tower.``."""

    @staticmethod
    def read(public: Mapping[str, Tensor], backbone: VisionBackbone) -> dict[str, Tensor]:
        """Return the tensors under the tuned backbone's names."""

    @staticmethod
    def write(own: Mapping[str, Tensor], backbone: VisionBackbone) -> dict[str, Tensor]:
        """Return a tuned backbone's state under the public names; views where possible."""


class _CoVFT:
    """CoMoE layers in the place of FFNs: ``mlp.experts.{n}.{0,2}``, CVE and ``mlp.gate``."""

    _LAYER = re.compile(
        r"(?P<mlp>.*\.layers\.(?P<block>\d+)\.mlp\.)"
        r"(?P<name>(experts|image_resblock|text_resblock|cross_attn|gate)\..+)"
    )
    #: Their first expert stands in for the FFN, so that a whole plain encoder can be read.
    _STAND_INS = (("fc1.", "experts.0.0."), ("fc2.", "experts.0.2."))

    @classmethod
    def read(cls, public: Mapping[str, Tensor], backbone: VisionBackbone) -> dict[str, Tensor]:
        """See :class:`TunedEncoder`."""
        layers: dict[str, dict[str, Tensor]] = {}
        plain: dict[str, Tensor] = {}
        for key, tensor in public.items():
            match = cls._LAYER.fullmatch(key)
            if match is None:
                plain[key] = tensor
                continue
            layers.setdefault(match["block"], {})[match["name"]] = tensor
            for own, expert in cls._STAND_INS:
                if match["name"].startswith(expert):
                    plain[match["mlp"] + own + match["name"].removeprefix(expert)] = tensor
        ours = {
            name: tensor
            for name, tensor in backbone.import_state_dict(plain).items()
            if not any(name.startswith(f"blocks.{block}.mlp.") for block in layers)
        }
        for block, state in layers.items():
            layer = copy.deepcopy(_comoe(backbone, block))
            layer.load_public_state_dict(state)
            prefix = f"blocks.{block}.mlp."
            ours.update({prefix + name: tensor for name, tensor in layer.state_dict().items()})
        return ours

    @classmethod
    def write(cls, own: Mapping[str, Tensor], backbone: VisionBackbone) -> dict[str, Tensor]:
        """See :class:`TunedEncoder`."""
        plain = dict(own)
        public: dict[str, Tensor] = {}
        for index, block in enumerate(backbone.blocks):
            if not isinstance(block.mlp, CoMoE):
                continue
            prefix = f"blocks.{index}.mlp."
            layer = copy.deepcopy(block.mlp)
            names = [name for name in own if name.startswith(prefix)]
            layer.load_state_dict(
                {name.removeprefix(prefix): plain.pop(name) for name in names}, assign=True
            )
            theirs = f"{_TOWER}vision_model.encoder.layers.{index}.mlp."
            state = layer.public_state_dict()
            public.update({theirs + name: tensor for name, tensor in state.items()})
        return {**_in_tower(plain, backbone), **public}


class _LoRA:
    """Wrapped projections: ``{original_layer,lora_down,lora_up}``."""

    _FACTORS = (("lora_down.weight", "lora_a"), ("lora_up.weight", "lora_b"))
    _PROJECTION = re.compile(rf"(blocks\.\d+\.attn\.({'|'.join(PROJECTIONS)})\.)(weight|bias)")

    @classmethod
    def read(cls, public: Mapping[str, Tensor], backbone: VisionBackbone) -> dict[str, Tensor]:
        """See :class:`TunedEncoder`."""
        plain: dict[str, Tensor] = {}
        factors: dict[str, Tensor] = {}
        for key, tensor in public.items():
            match = re.fullmatch(r".*\.layers\.(\d+)\.self_attn\.(\w+)\.(lora_\w+\.weight)", key)
            if match is None:
                plain[key.replace(".original_layer.", ".")] = tensor
            elif int(match[1]) < len(backbone.blocks):
                leaf = dict(cls._FACTORS)[match[3]]
                factors[f"blocks.{match[1]}.attn.{match[2]}.{leaf}"] = tensor
        renamed = {
            cls._PROJECTION.sub(r"\1base.\3", name): tensor
            for name, tensor in backbone.import_state_dict(plain).items()
        }
        return {**renamed, **factors}

    @classmethod
    def write(cls, own: Mapping[str, Tensor], backbone: VisionBackbone) -> dict[str, Tensor]:
        """See :class:`TunedEncoder`."""
        factors = {name: t for name, t in own.items() if name.endswith((".lora_a", ".lora_b"))}
        plain = {n.replace(".base.", "."): t for n, t in own.items() if n not in factors}
        public = {
            re.sub(r"(\.self_attn\.\w+\.)(weight|bias)$", r"\1original_layer.\2", name): tensor
            for name, tensor in _in_tower(plain, backbone).items()
        }
        theirs = {own: leaf for leaf, own in cls._FACTORS}
        for name, tensor in factors.items():
            _, block, _, projection, leaf = name.split(".")
            owner = f"{_TOWER}vision_model.encoder.layers.{block}.self_attn.{projection}."
            public[owner + theirs[leaf]] = tensor
        return public


class _VPT:
    """Prompts beside the tower, ``prompt_embeddings.{block}``, (1, prompts, D)."""

    @staticmethod
    def read(public: Mapping[str, Tensor], backbone: VisionBackbone) -> dict[str, Tensor]:
        """See :class:`TunedEncoder`."""
        prompts: dict[str, Tensor] = {}
        plain: dict[str, Tensor] = {}
        for key, tensor in public.items():
            match = re.fullmatch(r"prompt_embeddings\.(\d+)", key)
            if match is None:
                plain[key] = tensor
            elif int(match[1]) < len(backbone.blocks):
                # The public code has prompts for CLIP's last block, too, which LLaVA never reads.
                prompts[f"blocks.{match[1]}.prompts"] = tensor.squeeze(0)
        renamed = {
            re.sub(r"^(blocks\.\d+\.)", r"\1block.", name): tensor
            for name, tensor in backbone.import_state_dict(plain).items()
        }
        return {**renamed, **prompts}

    @staticmethod
    def write(own: Mapping[str, Tensor], backbone: VisionBackbone) -> dict[str, Tensor]:
        """See :class:`TunedEncoder`."""
        plain: dict[str, Tensor] = {}
        prompts: dict[str, Tensor] = {}
        for name, tensor in own.items():
            if name.endswith(".prompts"):
                prompts[f"prompt_embeddings.{name.split('.')[1]}"] = tensor.unsqueeze(0)
            else:
                plain[re.sub(r"^(blocks\.\d+\.)block\.", r"\1", name)] = tensor
        return {**_in_tower(plain, backbone), **prompts}


#: By the method's class name; other methods have no public names.
TUNED: dict[str, type[TunedEncoder]] = {"CoVFT": _CoVFT, "LoRA": _LoRA, "VPT": _VPT}


def _comoe(backbone: VisionBackbone, block: str) -> CoMoE:
    layer = backbone.blocks[int(block)].mlp
    assert isinstance(layer, CoMoE), "the file's layer range was compared with the model's"
    return layer


def _in_tower(plain: Mapping[str, Tensor], backbone: VisionBackbone) -> dict[str, Tensor]:
    public = backbone.export_state_dict(plain)
    return {_TOWER + name: tensor for name, tensor in public.items()}
