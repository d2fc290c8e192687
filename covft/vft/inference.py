"""Routing at inference: read CoMoE's gates, keep the largest alone, or use given ones.

The gates depend on image and instruction, not on the answer, and often on the task alone; computing
a layer's strongest experts only, or reusing gates without CVE and router, saves time
(:func:`inference_routing`). The model stays the one that was trained: nothing outside changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from covft.models.text_encoder import Context
from covft.models.vision.tower import VisionTower
from covft.vft.comoe import CoMoE, InferenceRouting


def comoe_layers(tower: VisionTower) -> dict[int, CoMoE]:
    """Return the CoMoE layers by the index of their block.

    Raises:
        ValueError: If there are none.
    """
    layers = {i: b.mlp for i, b in enumerate(tower.backbone.blocks) if isinstance(b.mlp, CoMoE)}
    if not layers:
        raise ValueError(
            f"the encoder is tuned by {type(tower.vft).__name__} and has no CoMoE layers; their "
            "routing exists under CoVFT only"
        )
    return layers


@torch.no_grad()
def collect_gates(
    tower: VisionTower, pixel_values: Tensor, context: Context | None
) -> dict[int, Tensor]:
    """Return what each router gives the images, in the tower's present mode, without gradients.

    Args:
        tower: A tower tuned by CoVFT.
        pixel_values: As :meth:`VisionTower.forward` takes them, (I, 3, S, S).
        context: Text features of each image's instruction; None where no text is read.

    Returns:
        The gates (I, E) by block index.

    Raises:
        ValueError: If there are no CoMoE layers, or :func:`inference_routing` is active.
    """
    layers = comoe_layers(tower)
    if any(layer.inference is not None for layer in layers.values()):
        raise ValueError(
            "collect_gates inside inference_routing(...) would return gates other than those in "
            "use; call it outside"
        )
    gates: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for index, layer in layers.items():
            hooks.callback(_keep_output(layer.router, gates, index))
        tower(pixel_values, context)
    return gates


@contextmanager
def inference_routing(
    tower: VisionTower, *, top_k: int | None = None, gates: Mapping[int, Tensor] | None = None
) -> Iterator[None]:
    """Route otherwise while the context is active; nested, the inner one alone applies.

    A :class:`~covft.models.vision.feature_cache.FeatureCache` that is used inside and outside drops
    what it holds where that depends on the routing. Where no layer's router reads text any more,
    the context may be left out, and :class:`~covft.models.mllm.MLLM` doesn't run its text encoder.

    Args:
        tower: A tower tuned by CoVFT, in evaluation mode.
        top_k: Experts that each layer keeps per image, their gates scaled to sum to 1; the others
            aren't computed. None keeps all.
        gates: Gates by block index that replace those of CVE and router, which aren't computed:
            (I, E) for forwards of I images, or (1, E), such as a task's mean, for any number.
            Layers that aren't named ask their own router.

    Raises:
        ValueError: If there are no CoMoE layers, neither or an impossible argument is given, or
            the model is in training mode; in the forward, if gradients are recorded, or gates and
            images differ in number.
    """
    layers = comoe_layers(tower)
    if any(layer.training for layer in layers.values()):
        raise ValueError("inference_routing is for inference; call model.eval() before")
    if top_k is None and not gates:
        raise ValueError("inference_routing changes nothing without top_k or gates; give one")
    given = {} if gates is None else dict(gates)
    _check(layers, top_k, given)
    before = {index: layer.inference for index, layer in layers.items()}
    for index, layer in layers.items():
        # A copy, so that gates changed meanwhile can't disagree with features that are cached.
        fixed = given[index].detach().clone() if index in given else None
        layer.inference = InferenceRouting(top_k, fixed)
    try:
        yield
    finally:
        for index, layer in layers.items():
            layer.inference = before[index]


def _check(layers: Mapping[int, CoMoE], top_k: int | None, gates: Mapping[int, Tensor]) -> None:
    num_experts = next(iter(layers.values())).experts.num_experts
    if top_k is not None and not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be 1 to {num_experts}, the layers' experts; got {top_k}")
    unknown = sorted(gates.keys() - layers.keys())
    if unknown:
        raise ValueError(
            f"gates are given for the blocks {unknown}, but CoMoE layers are in {list(layers)}"
        )
    for index, value in gates.items():
        if value.dim() != 2 or value.shape[1] != num_experts:
            raise ValueError(
                f"gates of block {index}: expected (images, {num_experts}) or (1, {num_experts}), "
                f"got {tuple(value.shape)}"
            )
    rows = {len(value) for value in gates.values()} - {1}
    if len(rows) > 1:
        raise ValueError(f"gates are given for different image counts: {sorted(rows)}")


def _keep_output(router: nn.Module, gates: dict[int, Tensor], index: int) -> Callable[[], None]:
    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        gates[index] = output.detach()

    return router.register_forward_hook(keep).remove
