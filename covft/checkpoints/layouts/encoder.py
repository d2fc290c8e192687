"""A plain encoder's weights as those of an encoder that a VFT method has changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from covft.models.vision.backbone import VisionBackbone
from covft.models.vision.tower import VisionTower
from covft.models.vision.vit import ViT


def read_encoder(public: Mapping[str, Tensor], tower: VisionTower) -> dict[str, Tensor]:
    """Translate a public plain encoder to a tower's weights.

    Where the method adds to the encoder, it is applied to a plain copy that holds the file's
    weights: CoVFT's experts become copies of the file's FFNs, and the method's own parameters are
    drawn anew (the random state of the caller stays as it is).

    Args:
        public: The encoder under any public names.
        tower: The tower that the weights are for; it isn't changed.

    Returns:
        Tensors under the names of the MLLM, ``vision.…``.

    Raises:
        ValueError: If the weights aren't those of the tower's plain encoder.
    """
    backbone = tower.backbone
    plain = _read_plain(public, backbone)
    own = backbone.state_dict()
    if tower.connector is None and plain.keys() == own.keys():
        return {f"vision.backbone.{name}": tensor for name, tensor in plain.items()}
    with torch.random.fork_rng(devices=[]):
        tuned = VisionTower(
            backbone=_plain_copy(backbone, plain), vft=tower.vft, context_dim=tower.context_dim
        )
    return {f"vision.{name}": tensor for name, tensor in tuned.state_dict().items()}


def _read_plain(public: Mapping[str, Tensor], backbone: VisionBackbone) -> dict[str, Tensor]:
    """Read the plain encoder; a file of another family is named."""
    try:
        return backbone.import_state_dict(public)
    except ValueError as error:
        families = [kind for kind in VisionBackbone.__subclasses__() if _is_all_of(kind, public)]
        if not families or any(isinstance(backbone, kind) for kind in families):
            raise
        names = " or ".join(sorted(kind.__name__ for kind in families))
        raise ValueError(
            f"the file's encoder is {names}, the model's {type(backbone).__name__}; change "
            "model.vision.backbone"
        ) from error


def _is_all_of(family: type[VisionBackbone], public: Mapping[str, Tensor]) -> bool:
    try:
        ours, unknown = family.layout.to_ours(public)
    except ValueError:
        return False
    return bool(ours) and not unknown


def _plain_copy(backbone: VisionBackbone, weights: Mapping[str, Tensor]) -> VisionBackbone:
    """Return the encoder as it was before the method, with other weights."""
    plain = copy.copy(backbone)
    with torch.device("meta"):
        fresh = ViT(
            backbone.config,
            select_layer=backbone.select_layer,
            final_norm=isinstance(backbone.final_norm, nn.LayerNorm),
            checkpointing=backbone.checkpointing,
        )
    # The family's class and settings stay; modules and parameters are the plain ViT's.
    vars(plain).update(vars(fresh))
    dtype = next(backbone.parameters()).dtype
    plain.load_state_dict({n: w.to(dtype) for n, w in weights.items()}, assign=True)
    return plain
