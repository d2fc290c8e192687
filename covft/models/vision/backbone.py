"""What the encoder families share: named variants, and weights from public checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from covft.models.checkpointing import Setting
from covft.models.vision.image_spec import ImageSpec, Resize
from covft.models.vision.layout import CheckpointLayout
from covft.models.vision.pretrained import locate, read_config, read_tensors
from covft.models.vision.vit import ViT, ViTConfig
from covft.registry import nearest, shortened

_ACTS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Variant:
    """A published encoder: where its weights are, and its architecture."""

    hub_id: str
    config: ViTConfig


class VisionBackbone(ViT):
    """A ViT of one family; the families are subclasses that only state what sets them apart.

    Args:
        arch: A name in ``variants`` (default: the first), or a dict of :class:`ViTConfig` fields
            that override the first variant. With weights and no ``arch``, the weights' config.json
            decides.
        select_layer: The hidden state to read, see :class:`ViT`; default: the family's.
        weights: None (random), ``pretrained`` (the variant's hub id), a folder, or a hub id.
        image_size: Input side in pixels; learned position embeddings are interpolated to it on
            loading.
        grid: Patches per side instead of ``image_size``: the same number of tokens, whatever the
            family's patch size.
        checkpointing: Which blocks recompute their activations in the backward pass: False, True,
            "selective", a share, or a budget, see :mod:`covft.models.checkpointing`.
        drop_path: DropPath rate of the last block; default 0, whatever the weights were trained
            with.
        final_norm: Apply the last LayerNorm; only where the last block is read.

    Raises:
        ValueError: If the architecture is unknown or impossible, or the weights don't fit it.
    """

    variants: ClassVar[Mapping[str, Variant]]
    default_select_layer: ClassVar[int] = -2
    mean: ClassVar[tuple[float, float, float]]
    std: ClassVar[tuple[float, float, float]]
    resize: ClassVar[Resize]
    layout: ClassVar[CheckpointLayout]
    # config.json: its accepted model types; our field -> (its key, transformers' default for it,
    # since configs leave out what equals the default); and the only values that this ViT can be.
    model_types: ClassVar[tuple[str, ...]]
    config_keys: ClassVar[Mapping[str, tuple[str, Any]]]
    config_required: ClassVar[Mapping[str, Any]] = {"num_channels": 3}

    def __init__(
        self,
        *,
        arch: str | Mapping[str, Any] | None = None,
        select_layer: int | None = None,
        weights: str | None = None,
        image_size: int | None = None,
        grid: int | None = None,
        checkpointing: Setting = False,
        drop_path: float | None = None,
        final_norm: bool = False,
    ) -> None:
        hub_id = self._hub_id(arch, weights)
        folder = None if weights is None else locate(_source(weights, hub_id))
        if image_size is not None and grid is not None:
            raise ValueError("give image_size or grid (patches per side), not both")
        config = self._architecture(arch, folder, image_size, grid)
        if drop_path is not None:
            config = replace(config, drop_path=drop_path)
        options: dict[str, Any] = {
            "select_layer": self.default_select_layer if select_layer is None else select_layer,
            "final_norm": final_norm,
            "checkpointing": checkpointing,
        }
        device = torch.empty(0).device
        if folder is None:
            super().__init__(config, **options)
        elif device.type == "meta":
            raise ValueError("weights can't be loaded on the meta device; build with weights=None")
        else:
            with torch.device("meta"):  # no time lost on initial values that the weights replace
                super().__init__(config, **options)
            self.to_empty(device=device)
        self.hub_id = hub_id
        #: Where the weights were read from; None if they are random.
        self.weights_folder = folder
        # Kept because a fine-tuning method may replace modules: import is into the plain encoder.
        self._plain_shapes = {name: tensor.shape for name, tensor in self.state_dict().items()}
        if folder is not None:
            try:
                state = self.import_state_dict(read_tensors(folder))
            except ValueError as error:
                raise ValueError(f"{type(self).__name__} can't load '{folder}': {error}") from error
            self.load_state_dict(state)

    @property
    def image_spec(self) -> ImageSpec:
        """The pixels that this encoder expects."""
        return ImageSpec(self.config.image_size, self.mean, self.std, self.resize)

    def import_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename a public checkpoint to our names, and interpolate its position embeddings.

        Args:
            state: A checkpoint of this family in any public layout, alone or inside a whole model.

        Returns:
            A tensor for each parameter of the plain encoder; those of unbuilt blocks are dropped.

        Raises:
            ValueError: If parameters are missing, of other shapes, or not of this family.
        """
        ours, unknown = self.layout.to_ours(state)
        missing: list[str] = []
        misshapen: list[str] = []
        result: dict[str, Tensor] = {}
        for name, shape in self._plain_shapes.items():
            tensor = ours.pop(name, None)
            if tensor is None:
                missing.append(name)
                continue
            result[name] = tensor = self._fit(name, tensor, shape)
            if tensor.shape != shape:
                misshapen.append(f"{name} {tuple(tensor.shape)} instead of {tuple(shape)}")
        unknown += [name for name in ours if not self._is_unbuilt(name)]
        faults = {"missing": missing, "of another shape": misshapen, "unexpected": unknown}
        if any(faults.values()):
            lists = "; ".join(
                f"{what}: {shortened(names)}" for what, names in faults.items() if names
            )
            raise ValueError(
                f"the checkpoint doesn't fit the architecture ({lists}); check arch and weights"
            )
        return result

    def export_state_dict(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Rename the encoder's parameters to the hub's layout, values untouched.

        Args:
            state: What to rename; default: this encoder's own. Give a merged one where a
                fine-tuning method has changed the modules.

        Raises:
            ValueError: If a parameter isn't one of the plain encoder's.
        """
        return self.layout.to_public(self.state_dict() if state is None else state)

    @classmethod
    def fields_from_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Read :class:`ViTConfig` fields from a hub config.json, alone or with a ``vision_config``.

        Raises:
            ValueError: If it is another family's, or describes a ViT that this one can't be.
        """
        vision = config.get("vision_config", config)
        kind = vision.get("model_type", config.get("model_type"))
        if kind not in cls.model_types:
            raise ValueError(
                f"config.json has model_type '{kind}', {cls.__name__} expects "
                f"{' or '.join(cls.model_types)}; change the backbone's type or its weights"
            )
        for key, value in cls.config_required.items():
            if vision.get(key, value) != value:
                raise ValueError(
                    f"config.json has {key}={vision[key]!r}, {cls.__name__} supports {value!r} only"
                )
        found = {
            ours: _scalar(vision.get(key, default))
            for ours, (key, default) in cls.config_keys.items()
        }
        if found["act"] not in _ACTS:
            raise ValueError(
                f"config.json has hidden_act '{found['act']}', known: {', '.join(_ACTS)}"
            )
        return {**found, "act": _ACTS[found["act"]]}

    @classmethod
    def _hub_id(cls, arch: str | Mapping[str, Any] | None, weights: str | None) -> str | None:
        if isinstance(arch, str):
            if arch not in cls.variants:
                hint = nearest(arch, cls.variants)
                raise ValueError(f"{cls.__name__} has no variant '{arch}'; {hint}")
            return cls.variants[arch].hub_id
        if arch is None and weights in (None, "pretrained"):
            return next(iter(cls.variants.values())).hub_id
        return None

    @classmethod
    def _architecture(
        cls,
        arch: str | Mapping[str, Any] | None,
        folder: Path | None,
        image_size: int | None,
        grid: int | None,
    ) -> ViTConfig:
        config = cls._named_architecture(arch)
        published = None if folder is None else read_config(folder)
        if published is not None:
            found = cls.fields_from_config(published)
            if arch is None:
                config = replace(config, **found)
            else:
                _check_same(config, found, ignore_size=(image_size or grid) is not None)
        elif folder is not None and arch is None:
            raise ValueError(f"no config.json in '{folder}': give the backbone's arch")
        if grid is not None:
            image_size = grid * config.patch_size
        if image_size is None or image_size == config.image_size:
            return config
        return _checked_size(replace(config, image_size=image_size))

    @classmethod
    def _named_architecture(cls, arch: str | Mapping[str, Any] | None) -> ViTConfig:
        if isinstance(arch, str):
            return cls.variants[arch].config
        default = next(iter(cls.variants.values())).config
        if not arch:
            return default
        known = [item.name for item in fields(ViTConfig)]
        for name in arch:
            if name not in known:
                raise ValueError(f"arch has no field '{name}'; {nearest(name, known)}")
        return _checked_size(replace(default, **arch))

    def _fit(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
        """Add the leading dimensions of size 1 that we have; interpolate positions to our grid."""
        while tensor.dim() < len(shape):
            tensor = tensor.unsqueeze(0)
        if name == "pos_embed" and tensor.shape[1] != shape[1]:
            return interpolate_positions(
                tensor, self.config.grid, num_prefix=int(self.config.use_cls)
            )
        return tensor

    def _is_unbuilt(self, name: str) -> bool:
        first, _, rest = name.partition(".")
        if first == "blocks":
            return self.select_layer <= int(rest.split(".")[0]) < self.config.depth
        return first == "final_norm" and name not in self._plain_shapes


def interpolate_positions(positions: Tensor, grid: int, *, num_prefix: int) -> Tensor:
    """Resample learned position embeddings to another grid, as transformers does for DINOv2.

    Args:
        positions: (1, num_prefix + M * M, D); returned as they are where M isn't whole.
        grid: Patches per side wanted.
        num_prefix: Leading positions without a place, kept.

    Returns:
        (1, num_prefix + grid * grid, D), resampled bicubically in float32 without antialiasing.
    """
    prefix, patches = positions[:, :num_prefix], positions[:, num_prefix:]
    side = int(patches.shape[1] ** 0.5)
    if side * side != patches.shape[1]:
        return positions
    square = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2).float()
    resized = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat((prefix, resized.flatten(2).transpose(1, 2).to(positions.dtype)), dim=1)


def _source(weights: str, hub_id: str | None) -> str:
    if weights != "pretrained":
        return weights
    if hub_id is None:
        raise ValueError(
            "weights='pretrained' needs a named arch; a dict is an architecture of your own: "
            "set weights to None, a folder or a hub id"
        )
    return hub_id


def _check_same(config: ViTConfig, found: Mapping[str, Any], *, ignore_size: bool) -> None:
    differing = [
        f"{name}: arch {getattr(config, name)!r}, config.json {value!r}"
        for name, value in found.items()
        if getattr(config, name) != value and not (name == "image_size" and ignore_size)
    ]
    if differing:
        raise ValueError(
            f"arch and the weights' config.json differ ({'; '.join(differing)}); leave out arch to "
            "take the weights' architecture, and set image_size to run them at another size"
        )


def _checked_size(config: ViTConfig) -> ViTConfig:
    # Only sizes that a user chose: SigLIP's published so400m-patch14-384 does cut off 6 pixels.
    size, patch = config.image_size, config.patch_size
    if size % patch:
        raise ValueError(
            f"image_size ({size}) must be a multiple of patch_size ({patch}); "
            f"the nearest is {max(round(size / patch), 1) * patch}"
        )
    return config


def _scalar(value: Any) -> Any:
    """Turn InternViT's [448, 448] into 448."""
    if not isinstance(value, (list, tuple)):
        return value
    if len(set(value)) != 1:
        raise ValueError(f"config.json has {value}, expected a square")
    return value[0]
