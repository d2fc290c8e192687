"""Fully sharded data parallel (FSDP2): every process holds its part of weights and optimizer.

Sharded one by one are the blocks of the vision encoder, the layers of the LLM, what several blocks
share, the rest of the tower, and the projector: their weights are gathered when they run, and freed
after it. What is left (the LLM's embeddings, last norm and output layer) is gathered from a
micro-batch's forward to the end of its backward. PyTorch FSDP (Zhao et al., VLDB 2023),
``fully_shard`` of torch.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_world_size, is_main_process
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from covft.checkpoints.run import best_device
from covft.checkpoints.sharded import (
    load_tensors,
    optimizer_key,
    save_tensors,
    stored_optimizer_entries,
    stored_tensors,
    weight_key,
)
from covft.checkpoints.trainable import trainable_state_dict
from covft.engine.optim_wrapper import AutocastOptimWrapper, checked_precision
from covft.engine.optimizer import OPTIMIZERS
from covft.engine.strategies.base import STRATEGIES, Strategy
from covft.models.projectors import Projector
from covft.models.text_encoder import FrozenTextEncoder
from covft.models.vision.tower import VisionTower
from covft.models.vision.vit import ViT
from covft.registry import nearest

_DTYPES = ("auto", "float32", "bfloat16")
_FUSED = (torch.optim.Adam, torch.optim.AdamW)
#: What a run calls on the model beside its forward; nothing that the forward itself calls.
_FORWARD_METHODS = ("generate",)


@STRATEGIES.register_module(name=["fsdp2", "FSDP2Strategy"])
class FSDP2Strategy(Strategy):
    """Weights, gradients and optimizer in shards, on GPUs through NCCL or on CPUs through gloo.

    The frozen text encoder isn't sharded: it would be gathered whole for every step anyway.

    Args:
        param_dtype: In which a block's weights are gathered and used; "auto" is "bfloat16" on GPUs
            where the precision is bf16, and otherwise the weights' own. The residual stream keeps
            the type that it has under autocast with other strategies.
        reduce_dtype: In which gradients are averaged; "auto" is "float32", of a float64 model that.
        reshard_after_forward: Free a block's weights between forward and backward too. False saves
            half the gathering, and costs the memory of all gathered blocks.
        cpu_offload: Keep shards and optimizer in the host's memory.
        parts: What every strategy takes; given by the engine.

    Raises:
        ValueError: If a type is unknown.
    """

    name = "fsdp2"
    is_sharded = True

    def __init__(
        self,
        *,
        param_dtype: str = "auto",
        reduce_dtype: str = "auto",
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        **parts: Any,
    ) -> None:
        super().__init__(**parts)
        self.param_dtype = _checked_dtype("param_dtype", param_dtype)
        self.reduce_dtype = _checked_dtype("reduce_dtype", reduce_dtype)
        self.reshard_after_forward = reshard_after_forward
        self.cpu_offload = cpu_offload

    @classmethod
    def check(cls, options: Mapping[str, Any], stage: Mapping[str, Any]) -> None:
        """Find what can't be sharded, or has no effect."""
        for key in ("param_dtype", "reduce_dtype"):
            _checked_dtype(key, options.get(key, "auto"))
        optim_wrapper = stage.get("optim_wrapper") or {}
        precision = optim_wrapper.get("precision", "auto")
        casts = best_device() == "cuda" and checked_precision(precision, "cuda") == "bf16"
        if options.get("param_dtype") == "bfloat16" and not casts:
            # Autocast takes care of norms with such weights; on CPUs it doesn't.
            raise ValueError(
                "strategy.param_dtype='bfloat16' needs a GPU and optim_wrapper.precision='bf16' "
                f"(it is '{precision}', on {best_device()}); remove it, or change that"
            )
        if options.get("cpu_offload") and best_device() == "cpu":
            raise ValueError("strategy.cpu_offload has no effect without a GPU; remove it")
        # Where a part is missing, what builds it says so.
        optimizer = (optim_wrapper.get("optimizer") or {}).get("type")
        if optimizer is not None:
            _optimizer_class(optimizer)
        if ((stage.get("model") or {}).get("llm") or {}).get("quantization"):
            raise ValueError(
                "strategy 'fsdp2' can't shard model.llm.quantization's 4-bit weights; use 'ddp'"
            )

    def build_optim_wrapper(
        self, optim_wrapper: Mapping[str, Any], model: nn.Module
    ) -> AutocastOptimWrapper:
        """Build the optimizer, fused where torch has fused it for sharded tensors too."""
        optimizer = dict(optim_wrapper["optimizer"])
        kind = _optimizer_class(optimizer["type"])
        if kind not in _FUSED and "fused" in inspect.signature(kind).parameters:
            optimizer.setdefault("fused", False)
        return super().build_optim_wrapper({**optim_wrapper, "optimizer": optimizer}, model)

    def full_state(self) -> dict[str, Tensor]:
        """Put together what training changes of the model, a tensor at a time."""
        state = {n: _whole(value) for n, value in trainable_state_dict(self.model).items()}
        return {n: value for n, value in state.items() if value is not None}

    def full_optimizer_state(self) -> dict[str, Any]:
        """Put together the optimizer's state dict, as one process would have it."""
        saved = self.optim_wrapper.optimizer.state_dict()
        state = {
            index: {key: _whole(value) for key, value in entries.items()}
            for index, entries in saved["state"].items()
        }
        return {**saved, "state": state} if is_main_process() else {}

    def load_full_state(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> None:
        """Take this process's parts of a whole state, which every process has read."""
        own = trainable_state_dict(self.model)
        with torch.no_grad():
            for name, value in weights.items():
                own[name].copy_(_part_of(value, own[name]))
        parameters = dict(enumerate(p for _, p in self.optim_wrapper._named_parameters()))
        self._load_optimizer(
            {
                index: {key: _part_of(value, parameters[index]) for key, value in entries.items()}
                for index, entries in optimizer["state"].items()
            }
        )

    def save_shards(self, folder: Path) -> None:
        """Write this process's part through torch's distributed checkpoints."""
        tensors = {weight_key(n): v for n, v in trainable_state_dict(self.model).items()}
        state = self.optim_wrapper.optimizer.state
        for name, parameter in self.optim_wrapper._named_parameters():
            for entry, value in state.get(parameter, {}).items():
                tensors[optimizer_key(name, entry)] = value
        save_tensors(tensors, folder)

    def load_shards(self, folder: Path) -> None:
        """Read this process's part, however many processes have written the shards."""
        tensors = {weight_key(n): v for n, v in trainable_state_dict(self.model).items()}
        stored = stored_tensors(folder)
        entries = stored_optimizer_entries(folder)
        state: dict[int, dict[str, Tensor]] = {}
        for index, (name, parameter) in enumerate(self.optim_wrapper._named_parameters()):
            for entry in entries.get(name, ()):
                key = optimizer_key(name, entry)
                tensors[key] = _empty(*stored[key], like=parameter)
                state.setdefault(index, {})[entry] = tensors[key]
        load_tensors(tensors, folder)
        self._load_optimizer(state)

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        # The tower drops prefix tokens and so returns a view, which nothing writes into.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
        kept_whole = _text_encoder_parameters(model, self.device)
        offload = CPUOffloadPolicy() if self.cpu_offload else OffloadPolicy()
        mesh = init_device_mesh(self.device.type, (get_world_size(),))
        shard = partial(fully_shard, mesh=mesh, offload_policy=offload, ignored_params=kept_whole)
        blocks = _blocks(model)
        gathered = mixed_precision(
            self.param_dtype,
            self.reduce_dtype,
            casts=self.device.type == "cuda" and self.precision == "bf16",
            exact=any(p.dtype == torch.float64 for p in model.parameters()),
        )
        # Outside blocks nothing is cast: from the embeddings on, the residual stream would be.
        uncast = replace(gathered, param_dtype=None)
        for module in [*_shared_modules(blocks), *blocks]:
            shard(module, mp_policy=gathered, reshard_after_forward=self.reshard_after_forward)
        # Parts of their own, since the weights of a group must be of one type.
        parts = [m for m in model.modules() if isinstance(m, (VisionTower, Projector))]
        for module in [*parts, model]:
            shard(module, mp_policy=uncast)
        for name in _FORWARD_METHODS:
            if hasattr(model, name):
                register_fsdp_forward_method(model, name)
        return model


def mixed_precision(
    param_dtype: str, reduce_dtype: str, *, casts: bool, exact: bool
) -> MixedPrecisionPolicy:
    """Return in which types a block's weights are gathered and its gradients averaged.

    Args:
        param_dtype: See :class:`FSDP2Strategy`.
        reduce_dtype: See :class:`FSDP2Strategy`.
        casts: Whether "auto" gathers in bfloat16.
        exact: Whether the model is float64, which "auto" leaves alone.
    """
    auto = torch.bfloat16 if casts and not exact else None
    return MixedPrecisionPolicy(
        param_dtype=auto if param_dtype == "auto" else getattr(torch, param_dtype),
        reduce_dtype=(
            (None if exact else torch.float32)
            if reduce_dtype == "auto"
            else getattr(torch, reduce_dtype)
        ),
        cast_forward_inputs=False,  # autocast decides, as with other strategies
    )


def _optimizer_class(kind: Any) -> type[torch.optim.Optimizer]:
    """Return an optimizer of torch's; others may read parameters in ways that shards don't allow.

    Raises:
        ValueError: If it is none.
    """
    found = OPTIMIZERS.get(kind) if isinstance(kind, str) else kind
    if not (isinstance(found, type) and found.__module__.startswith("torch.optim")):
        name = kind if isinstance(kind, str) else getattr(kind, "__name__", kind)
        raise ValueError(
            f"strategy 'fsdp2' shards the optimizers of torch.optim, of which '{name}' is none: "
            "use AdamW, whose state is divided among the processes, or strategy 'ddp'"
        )
    return found


def _checked_dtype(key: str, name: str) -> str:
    if name not in _DTYPES:
        raise ValueError(f"strategy.{key} '{name}' is unknown; {nearest(name, _DTYPES)}")
    return name


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the encoder's blocks and the LLM's layers, in the order in which they run."""
    blocks: list[nn.Module] = []
    for part in model.children():
        if isinstance(part, FrozenTextEncoder):
            continue
        for module in part.modules():
            if isinstance(module, ViT):
                blocks += module.blocks
            elif isinstance(module, GradientCheckpointingLayer):
                blocks.append(module)
    return blocks


def _shared_modules(blocks: list[nn.Module]) -> list[nn.Module]:
    """Return the outermost modules that several blocks have in common, such as a shared CVE."""
    owners = Counter(module for block in blocks for module in block.modules())
    shared: list[nn.Module] = []
    for module, count in owners.items():
        inside = any(module in outer.modules() for outer in shared)
        if count > 1 and not inside and any(True for _ in module.parameters()):
            shared.append(module)
    return shared


def _text_encoder_parameters(model: nn.Module, device: torch.device) -> set[nn.Parameter]:
    """Move the frozen text encoder to the device; return its parameters."""
    encoders = [m for m in model.children() if isinstance(m, FrozenTextEncoder)]
    return {p for encoder in encoders for p in encoder.to(device).parameters()}


def _whole(value: Any) -> Any:
    """Return a copy on the CPU of all that the processes hold of it; None but on the main one."""
    if not isinstance(value, Tensor):
        return value
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.detach().to("cpu", copy=True) if is_main_process() else None


def _part_of(value: Any, like: Tensor) -> Any:
    """Return the part of ``value`` that is this process's of ``like``; all of other shapes."""
    if not isinstance(value, Tensor) or not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    # Every process has read the same file: nothing has to be sent.
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def _empty(shape: torch.Size, dtype: torch.dtype, *, like: Tensor) -> Tensor:
    """Return a tensor to load into, sharded like a parameter if it has the parameter's shape."""
    if isinstance(like, DTensor) and shape == like.shape:
        return torch.empty_like(like, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype, device=like.device)
