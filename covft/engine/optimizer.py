"""The optimizer: a learning rate per module, moments in 8 bits."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from mmengine import registry as mmengine_registry
from mmengine.logging import print_log
from torch import nn
from torch.distributed.tensor import DTensor

from covft.checkpoints.trainable import unwrapped
from covft.config import is_under
from covft.engine.bf16_adamw import BF16AdamW
from covft.engine.optim_wrapper import NO_DECAY, AutocastOptimWrapper
from covft.models.llm_adapters import import_bitsandbytes
from covft.registry import OPTIM_WRAPPERS, Registry, nearest

OPTIMIZERS = Registry(
    "optimizer", parent=mmengine_registry.OPTIMIZERS, locations=["covft.engine.optimizer"]
)
OPTIMIZERS.register_module(module=BF16AdamW)
#: Devices for which torch has fused optimizer kernels that are tested here.
_FUSED_DEVICES = ("cpu", "cuda")
_BASE = "base"


def build_optim_wrapper(model: nn.Module, cfg: Mapping[str, Any]) -> AutocastOptimWrapper:
    """Build the optimizer over the trainable parameters of ``model``.

    Args:
        model: The model, on its device, frozen where it is to be.
        cfg: ``optimizer`` (``dict(type="AdamW", lr=..., weight_decay=...)``; "AdamW8bit" and
            "PagedAdamW8bit" need bitsandbytes; "BF16AdamW" is the one for weights in bfloat16, see
            :mod:`covft.engine.bf16_adamw`), ``lr`` (a learning rate per prefix of parameter
            names, the longest prefix wins; "method" stands for the VFT method's own), and the
            arguments of :class:`AutocastOptimWrapper`.

    Raises:
        ValueError: If nothing is trainable, or a prefix matches no parameter.
        ImportError: If the optimizer's package isn't installed.
    """
    arguments = dict(cfg)
    optimizer_cfg = dict(arguments.pop("optimizer", None) or {})
    if "type" not in optimizer_cfg or "lr" not in optimizer_cfg:
        raise ValueError(
            "optim_wrapper.optimizer must be dict(type=..., lr=...), got "
            f"{optimizer_cfg or 'nothing'}"
        )
    groups = parameter_groups(
        model,
        lr=optimizer_cfg["lr"],
        prefix_lr=_resolve_rates(arguments.pop("lr", None) or {}, model),
        weight_decay=optimizer_cfg.get("weight_decay", 0.0),
    )
    kind = optimizer_cfg["type"]
    kind = OPTIMIZERS.get(kind) if isinstance(kind, str) else kind
    device_type = groups[0]["params"][0][1].device.type
    if kind is not None and "fused" in inspect.signature(kind).parameters:
        optimizer_cfg.setdefault("fused", device_type in _FUSED_DEVICES)
    optimizer = OPTIMIZERS.build({**optimizer_cfg, "params": groups})
    _warn_of_lost_updates(optimizer)
    arguments.setdefault("type", AutocastOptimWrapper)
    return OPTIM_WRAPPERS.build({**arguments, "optimizer": optimizer})


def parameter_groups(
    model: nn.Module, *, lr: float, prefix_lr: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """Sort the trainable parameters into named groups, in the order of the model's parameters.

    Args:
        model: The model.
        lr: Learning rate where no prefix matches.
        prefix_lr: Learning rate per prefix, such as ``projector`` or ``vision.backbone.blocks.3``.
        weight_decay: Decay of matrices; norms and biases (one-dimensional) get none.

    Returns:
        Groups with ``name``, ``lr``, ``weight_decay`` and ``params``, pairs of name and parameter.

    Raises:
        ValueError: If nothing is trainable, or a prefix matches no parameter.
    """
    named = [(n, p) for n, p in unwrapped(model).named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("the model has no trainable parameter; check its vft and freeze settings")
    _check_prefixes(prefix_lr, unwrapped(model))
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named:
        prefix = max((p for p in prefix_lr if is_under(name, p)), key=len, default=None)
        decays = weight_decay > 0 and parameter.ndim > 1
        group_name = (prefix or _BASE) + ("" if decays or weight_decay == 0 else NO_DECAY)
        group = groups.setdefault(
            group_name,
            {
                "name": group_name,
                "lr": lr if prefix is None else prefix_lr[prefix],
                "weight_decay": weight_decay if decays else 0.0,
                "params": [],
            },
        )
        group["params"].append((name, parameter))
    return list(groups.values())


def _eight_bit(kind: str) -> Callable[..., torch.optim.Optimizer]:
    """Return what builds the optimizer of that name in bitsandbytes, which it imports only then."""

    def build(
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        min_8bit_size: int = 4096,
    ) -> torch.optim.Optimizer:
        bitsandbytes = import_bitsandbytes(f"optim_wrapper.optimizer '{kind}'")
        optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, kind)(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            min_8bit_size=min_8bit_size,
        )
        return optimizer

    build.__name__ = kind
    return build


# AdamW with moments in 8 bits, quantised in blocks (Dettmers et al., ICLR 2022); "Paged" lets them
# move to the host's memory when a GPU's is full. Parameters below ``min_8bit_size`` elements keep
# float32 moments. Weights stay as they are: float32 ones, since bfloat16 would round most steps of
# a fine-tuning away.
for _kind in ("AdamW8bit", "PagedAdamW8bit"):
    OPTIMIZERS.register_module(name=_kind, module=_eight_bit(_kind))


def _warn_of_lost_updates(optimizer: torch.optim.Optimizer) -> None:
    """Warn if most of what an optimizer does to 16-bit weights would be rounded away."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    low = sum(p.numel() for p in weights if p.dtype in (torch.bfloat16, torch.float16))
    if low and not getattr(optimizer, "keeps_small_updates", False):
        remedy = "float32 weights (model.dtype, model.llm.dtype)"
        # Strategy 'fsdp2' refuses BF16AdamW.
        if not any(isinstance(p, DTensor) for p in weights):
            remedy = f"optim_wrapper.optimizer=dict(type='BF16AdamW', ...), or {remedy}"
        print_log(
            f"{type(optimizer).__name__} rounds its updates of {low:,} weights to their 16 bits: "
            "at lr 2e-5 most of the way that bfloat16 weights should go is lost. Use "
            f"{remedy}",
            logger="current",
            level=logging.WARNING,
        )


def _resolve_rates(prefix_lr: Mapping[str, float | str], model: nn.Module) -> dict[str, float]:
    """Put the VFT method's learning rate where a config says "method"."""
    rates: dict[str, float] = {}
    for prefix, rate in prefix_lr.items():
        if isinstance(rate, str):
            method = getattr(getattr(unwrapped(model), prefix, None), "vft", None)
            if rate != "method" or method is None:
                raise ValueError(
                    f"optim_wrapper.lr['{prefix}'] must be a number, or 'method' for the vision "
                    f"tower ('vision'), got '{rate}'"
                )
            rate = method.learning_rate
        rates[prefix] = rate
    return rates


def _check_prefixes(prefix_lr: Mapping[str, float], model: nn.Module) -> None:
    names = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for prefix in prefix_lr:
        if any(trainable and is_under(name, prefix) for name, trainable in names.items()):
            continue
        if any(is_under(name, prefix) for name in names):
            # No error: methods are compared under one config, and some freeze the encoder.
            print_log(
                f"optim_wrapper.lr: everything under '{prefix}' is frozen; its rate isn't used",
                logger="current",
                level=logging.WARNING,
            )
            continue
        depth = prefix.count(".") + 1
        known = {".".join(n.split(".")[:depth]) for n, trainable in names.items() if trainable}
        hint = nearest(prefix, known)
        raise ValueError(f"optim_wrapper.lr: no parameter's name starts with '{prefix}'; {hint}")
