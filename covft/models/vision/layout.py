"""Parameter names: between ours and those of public checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

# What whole models (CLIP, SigLIP, LLaVA, InternVL, a classifier) hold beside the vision encoder.
_BESIDE = re.compile(
    r"(model\.)?(text_model|text_projection|visual_projection|logit_scale|logit_bias|language_model"
    r"|lm_head|multi_modal_projector|mm_projector|mlp1|classifier)(\.|$)"
    r"|model\.(layers|embed_tokens|norm|context_embedding_model)\."
)


def is_beside_vision(key: str) -> bool:
    """Tell whether a checkpoint's key belongs to another part than its vision encoder."""
    return _BESIDE.match(key) is not None


@dataclass(frozen=True)
class CheckpointLayout:
    """How public checkpoints of one encoder family name the parameters of our ViT.

    Attributes:
        names: From our module (or parameter) to its public names; ``*`` is a block's index. The
            first name is the one exported; the others are read only.
        prefix: What the hub's checkpoint puts before every name. Reading finds the prefix itself.
        ignored: Regular expressions of names that are read past: heads, mask tokens, index buffers.
        leading_ones: Leading dimensions of size 1 that a parameter has here and not there.
    """

    names: Mapping[str, tuple[str, ...]]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    leading_ones: Mapping[str, int] = field(default_factory=dict)

    def to_ours(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Rename a public checkpoint's tensors; shapes stay.

        Returns:
            The tensors under our names, and the keys that mean nothing to this family.

        Raises:
            ValueError: If the checkpoint holds no, or more than one, vision encoder of this family.
        """
        prefix = self._find_prefix(state)
        renamed: dict[str, Tensor] = {}
        unknown: list[str] = []
        for key, tensor in state.items():
            name = key.removeprefix(prefix) if key.startswith(prefix) else None
            ours = self._rename(name) if name is not None else None
            if ours is not None:
                renamed[ours] = tensor
            elif not (name is not None and self._is_ignored(name)) and not is_beside_vision(key):
                unknown.append(key)
        return renamed, unknown

    def to_public(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename our tensors to the hub's names and shapes.

        Raises:
            ValueError: If a key isn't one of the plain encoder's.
        """
        public: dict[str, Tensor] = {}
        for key, tensor in state.items():
            name = _translate(key, self._to_public_rules)
            if name is None:
                raise ValueError(
                    f"'{key}' has no public name: a fine-tuning method changed the encoder; export "
                    "a plain encoder's state (merge or leave out the method's parameters)"
                )
            for _ in range(self.leading_ones.get(key, 0)):
                tensor = tensor.squeeze(0)
            public[self.prefix + name] = tensor
        return public

    def _find_prefix(self, keys: Iterable[str]) -> str:
        anchors = [f"{name}.weight" for name in self.names["patch_embed"]]
        prefixes = {
            key.removesuffix(anchor)
            for key in keys
            for anchor in anchors
            if key == anchor or key.endswith(f".{anchor}")
        }
        if len(prefixes) != 1:
            found = ", ".join(sorted(prefixes)) or ", ".join(sorted(keys)[:5]) or "nothing"
            raise ValueError(
                f"expected one vision encoder in the checkpoint, known by '{anchors[0]}', found "
                f"{found}; check that the weights belong to this encoder family"
            )
        return prefixes.pop()

    def _rename(self, name: str) -> str | None:
        return _translate(name, self._to_ours_rules)

    def _is_ignored(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    @cached_property
    def _to_ours_rules(self) -> list[tuple[re.Pattern[str], str]]:
        return [_rule(name, ours) for ours, names in self.names.items() for name in names]

    @cached_property
    def _to_public_rules(self) -> list[tuple[re.Pattern[str], str]]:
        return [_rule(ours, names[0]) for ours, names in self.names.items()]


def _rule(source: str, target: str) -> tuple[re.Pattern[str], str]:
    pattern = re.escape(source).replace(r"\*", r"(?P<block>\d+)")
    return re.compile(rf"{pattern}(?P<leaf>\.(weight|bias))?"), target


def _translate(name: str, rules: Iterable[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, target in rules:
        match = pattern.fullmatch(name)
        if match:
            groups = match.groupdict()
            return target.replace("*", groups.get("block") or "") + (groups["leaf"] or "")
    return None
