"""What the layouts share: parts by prefix, and a projector's layers by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from covft.checkpoints.layouts.encoder import read_encoder
from covft.models.mllm import MLLM
from covft.models.projectors import Projector
from covft.registry import shortened

#: Buffers that older files hold and models recompute.
_RECOMPUTED = re.compile(r".*\.(rotary_emb\.inv_freq|embeddings\.position_ids)")


@dataclass(frozen=True)
class Layout:
    """How public files name the weights of a whole MLLM.

    Attributes:
        name: What a user calls it.
        holds: What the files are, for messages.
        prefixes: From our prefix to the public ones. The first is written, the others are read
            only. What follows the vision encoder's prefix is named by the family's own layout.
        projectors: For each projector that the files can hold, from our layers to theirs, both as
            prefixes.
        marks: Regular expressions; files are in this layout if each matches the start of some name.
        optional: Parts that the files may leave out.
        ignored: Regular expressions of names that are read past.
    """

    name: str
    holds: str
    prefixes: Mapping[str, tuple[str, ...]]
    projectors: Mapping[type[Projector], Mapping[str, str]]
    marks: tuple[str, ...]
    optional: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = field(default=())

    @property
    def parts(self) -> set[str]:
        """Parts of an MLLM that the files can hold, such as "vision" and "llm"."""
        return {part_of(prefix) for prefix in self.prefixes}

    def detect(self, names: Collection[str]) -> bool:
        """Tell whether a file with these names is in this layout."""
        return all(any(re.match(mark, name) for name in names) for mark in self.marks)

    def to_ours(self, state: Mapping[str, Tensor], model: MLLM) -> dict[str, Tensor]:
        """Translate a public checkpoint for a model.

        A plain encoder's weights become those that the model's VFT method starts from: where it
        adds to the encoder, it is applied anew to the file's.

        Args:
            state: The file's tensors; those of ``optional`` parts may be absent.
            model: The model that they are for; it isn't changed.

        Returns:
            Tensors under the model's names, views where possible. Outside of the encoder, names
            and shapes are the file's, unchecked.

        Raises:
            ValueError: If the file is for another encoder or projector, or a key has no meaning.
        """
        self._check_projector(model)
        ours: dict[str, Tensor] = {}
        for prefix, part in self._split(state).items():
            if prefix == "vision.":
                ours.update(self._read_vision(part, model))
            elif prefix == "projector.":
                ours.update(self._read_projector(part, model))
            else:
                ours.update(self._read_other(prefix, part, model))
        return ours

    def from_ours(self, state: Mapping[str, Tensor] | None, model: MLLM) -> dict[str, Tensor]:
        """Translate a model's weights to the public names and shapes.

        Args:
            state: Weights under the names of :meth:`state_dict`; default: the model's own.
            model: The model that they belong to.

        Returns:
            The layout's parts, without a tied output layer; views where possible.

        Raises:
            ValueError: If the layout can't hold the model: its projector, or what its VFT method
                adds to the encoder.
        """
        self._check_projector(model)
        state = self.state_dict(model) if state is None else state
        left_out = tied_names(model)
        public: dict[str, Tensor] = {}
        vision: dict[str, Tensor] = {}
        for name, tensor in state.items():
            if part_of(name) not in self.parts or name in left_out:
                continue
            if part_of(name) == "vision":
                vision[name] = tensor
            elif part_of(name) == "projector":
                public[self._projector_name(name, model)] = tensor
            else:
                public[self._public_name(name)] = tensor
        return {**self._write_vision(vision, model), **public}

    def state_dict(self, model: MLLM) -> dict[str, Tensor]:
        """Return the weights of ``model`` that :meth:`from_ours` takes, under our names.

        Raises:
            ValueError: If the VFT method adds what a plain encoder can't hold.
        """
        return plain_state_dict(model)

    def _read_vision(self, part: Mapping[str, Tensor], model: MLLM) -> dict[str, Tensor]:
        return read_encoder(part, model.vision)

    def _write_vision(self, state: Mapping[str, Tensor], model: MLLM) -> dict[str, Tensor]:
        if "vision" not in self.parts:
            return {}
        public = self._export(plain_encoder_state(state, layout=self.name), model)
        prefix = self.prefixes["vision."][0]
        return {prefix + name: tensor for name, tensor in public.items()}

    def _export(self, plain: Mapping[str, Tensor], model: MLLM) -> dict[str, Tensor]:
        """Name the plain encoder's weights as the layout's files do."""
        return model.vision.backbone.export_state_dict(plain)

    def _read_projector(self, part: Mapping[str, Tensor], model: MLLM) -> dict[str, Tensor]:
        theirs = {public: own for own, public in self._projector_layers(model).items()}
        return {
            "projector." + _renamed(name, theirs, what=f"{self.name} projector layer"): tensor
            for name, tensor in part.items()
        }

    def _read_other(
        self, prefix: str, part: Mapping[str, Tensor], model: MLLM
    ) -> dict[str, Tensor]:
        return {prefix + name: tensor for name, tensor in part.items()}

    def _split(self, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Sort a file's tensors by our prefixes; theirs are cut off."""
        # The longest prefix first: LLaVA's LLM is "model.", its vision tower "model.vision_tower.".
        pairs = [(public, own) for own, names in self.prefixes.items() for public in names]
        pairs.sort(key=lambda pair: -len(pair[0]))
        parts: dict[str, dict[str, Tensor]] = {}
        unknown = []
        for key, tensor in state.items():
            if _RECOMPUTED.fullmatch(key) or any(re.fullmatch(p, key) for p in self.ignored):
                continue
            for public, own in pairs:
                if key.startswith(public):
                    parts.setdefault(own, {})[key.removeprefix(public)] = tensor
                    break
            else:
                unknown.append(key)
        if unknown:
            raise ValueError(
                f"{len(unknown)} keys mean nothing in layout '{self.name}' ({self.holds}): "
                f"{shortened(sorted(unknown))}"
            )
        return parts

    def _public_name(self, name: str) -> str:
        prefixes = {own: public[0] for own, public in self.prefixes.items()}
        return _renamed(name, prefixes, what=f"name in layout '{self.name}'")

    def _projector_name(self, name: str, model: MLLM) -> str:
        layers, own = self._projector_layers(model), name.removeprefix("projector.")
        public = _renamed(own, layers, what=f"name in layout '{self.name}'")
        return self.prefixes["projector."][0] + public

    def _projector_layers(self, model: MLLM) -> Mapping[str, str]:
        for kind, layers in self.projectors.items():
            if isinstance(model.projector, kind):
                return layers
        known = " or ".join(kind.__name__ for kind in self.projectors)
        raise ValueError(
            f"layout '{self.name}' is that of {self.holds}, with {known}, but the model's "
            f"projector is {type(model.projector).__name__}: use a config of that kind, such as "
            "llava15_7b_* for LLaVA-1.5 and internvl2_* for InternVL2"
        )

    def _check_projector(self, model: MLLM) -> None:
        self._projector_layers(model)


def plain_state_dict(model: MLLM) -> dict[str, Tensor]:
    """Return a model's weights with encoder and LLM as plain ones, under our names.

    LoRA is merged into both, and a quantised LLM dequantised. A text encoder is left out: a plain
    encoder doesn't read context.

    Raises:
        ValueError: If the VFT method adds what a plain encoder can't hold.
    """
    plain = model.vision.vft.plain_state_dict(model.vision.backbone)
    return {
        **{f"vision.backbone.{name}": tensor for name, tensor in plain.items()},
        **{f"projector.{name}": tensor for name, tensor in model.projector.state_dict().items()},
        **plain_llm_state(model),
    }


def plain_llm_state(model: MLLM) -> dict[str, Tensor]:
    """Return the LLM's weights under our names, LoRA merged and quantisation undone."""
    merged = model.llm.merged_state_dict()
    return {f"llm.model.{name}": tensor for name, tensor in merged.items()}


def plain_encoder_state(state: Mapping[str, Tensor], *, layout: str) -> dict[str, Tensor]:
    """Cut ``vision.backbone.`` off the names of an encoder's state.

    Raises:
        ValueError: If there is something beside the encoder.
    """
    connector = [name for name in state if not name.startswith("vision.backbone.")]
    if connector:
        raise ValueError(
            f"layout '{layout}' holds an encoder, but no connector behind it, which this VFT "
            f"method brings: {shortened(sorted(connector))}"
        )
    return {name.removeprefix("vision.backbone."): tensor for name, tensor in state.items()}


def part_of(name: str) -> str:
    """Return the part of the MLLM that a parameter belongs to."""
    return name.partition(".")[0]


def tied_names(model: MLLM) -> set[str]:
    """Return our names of an LLM's output layer if it shares the embeddings' weights."""
    llm = model.llm.model
    output = llm.get_output_embeddings()
    if output is None or output.weight is not llm.get_input_embeddings().weight:
        return set()
    return {f"llm.model.{name}.weight" for name, module in llm.named_modules() if module is output}


def _renamed(name: str, prefixes: Mapping[str, str], *, what: str) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise ValueError(
        f"'{name}' has no {what}; known beginnings: {', '.join(prefixes)}. Check that the model is "
        "built as the files' was"
    )
