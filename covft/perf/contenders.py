"""Methods that take turns in one model: they share the LLM, its optimizer state and the batches.

Two 7B models with their optimizer states don't fit one GPU; two vision towers do. The towers that
don't run wait in the host's memory with their optimizer states, so that what a method needs at its
peak is what it would need alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from covft.models.mllm import MLLM
from covft.models.vision.tower import VisionTower
from covft.perf.synthetic import random_model
from covft.registry import VFT, nearest


def method_configs(names: list[str], own: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the configs of methods by their class names.

    Args:
        names: Registered names, in any case.
        own: The recipe's ``vft``; its method keeps these options, every other has its defaults.

    Raises:
        ValueError: If a name isn't registered.
    """
    known = {name.lower(): name for name in VFT.names()}
    kind = own.get("type", "Freeze")
    own_class = VFT.get(kind) if isinstance(kind, str) else kind
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        if name.lower() not in known:
            raise ValueError(f"--methods {name}: no such method; {nearest(name, VFT.names())}")
        method = VFT.get(known[name.lower()])
        found[method.__name__] = {**(own if method is own_class else {}), "type": method}
    return found


class Contenders:
    """A model with one vision tower per method, of which one is in place.

    Args:
        model_cfg: The ``model`` of a config.
        methods: Configs of methods by name.
        device: Where the model runs.
        keep_all: Leave every tower there, for measurements of time alone.

    Attributes:
        model: The model, on its device, in training mode.
    """

    def __init__(
        self,
        model_cfg: Mapping[str, Any],
        methods: Mapping[str, Mapping[str, Any]],
        *,
        device: torch.device,
        keep_all: bool = False,
    ) -> None:
        self.device = device
        self._moves = device.type == "cuda" and not keep_all
        reading = [name for name, cfg in methods.items() if VFT.build(cfg).needs_context]
        # Built with a method that reads text, so that there is a text encoder for all that do.
        first = (reading or list(methods))[0]
        vision = dict(model_cfg["vision"])
        self.model: MLLM = random_model(
            {**model_cfg, "vision": {**vision, "vft": methods[first]}}, device=device
        )
        encoder = self.model.text_encoder
        context_dim = None if encoder is None else encoder.hidden_dim
        self.towers = {first: self.model.vision}
        for name, cfg in methods.items():
            if name != first:
                tower = random_tower({**vision, "vft": cfg}, device=device, context_dim=context_dim)
                self.towers[name] = tower.to(self.model.vision.backbone.patch_embed.weight.dtype)
        # Parts of the model, so that the engine's optimizer trains them.
        self.model.towers = nn.ModuleDict(self.towers)
        self.chosen = first

    def choose(self, name: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Put a method's tower in place; send the others, and their optimizer states, away."""
        if self._moves and name != self.chosen:
            _move(self.towers[self.chosen], optimizer, torch.device("cpu"))  # first make room
            _move(self.towers[name], optimizer, self.device)
        self.model.vision = self.towers[name]
        self.chosen = name

    def send_away(self) -> None:
        """Send every tower but the chosen one away; to be called once, after all are built."""
        for name, tower in self.towers.items():
            if self._moves and name != self.chosen:
                _move(tower, None, torch.device("cpu"))


def random_tower(
    vision_cfg: Mapping[str, Any], *, device: torch.device, context_dim: int | None
) -> VisionTower:
    """Build a vision tower with random weights; ``vision_cfg`` names no files."""
    with device:
        return VisionTower(**vision_cfg, context_dim=context_dim).train()


def _move(tower: nn.Module, optimizer: torch.optim.Optimizer | None, device: torch.device) -> None:
    parameters = list(tower.parameters())
    tower.to(device)
    if optimizer is None:
        return
    for parameter in parameters:  # the same objects: only their data has moved
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor):
                state[key] = value.to(device)
