"""What makes an LLM's training fit in less memory: LoRA, and weights in 4 bits.

LoRA (Hu et al., ICLR 2022, section 4.1): a frozen layer ``W x + b`` becomes
``W x + b + (alpha / r) B A dropout(x)``. QLoRA (Dettmers et al., NeurIPS 2023, section 3): the
frozen W are kept as 4-bit NormalFloat with doubly quantised constants, and are dequantised to
bfloat16 for each product.

Choices:

* As in LLaVA-1.5's ``finetune_lora``, every linear layer but the output layer is adapted, at rank
  128, alpha 256, dropout 0.05. LLaVA trains them at a learning rate of 2e-4, and the projector at
  2e-5: ``optim_wrapper.lr={"llm": 2e-4, "projector": 2e-5}``.
* A layer becomes a subclass of its class and keeps its place and parameters, so that the frozen
  weights keep their public names.
* A and B are float32 (or float64 beside such weights), whatever the frozen weights are: at these
  learning rates bfloat16 would round most steps away.
* Embeddings, norms and output layer aren't quantised; their type is ``llm.dtype``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from covft.models.low_rank import check_low_rank, merge_update, zero_update
from covft.registry import check_arguments, nearest

QUANTIZATIONS = ("nf4",)


@dataclass(frozen=True)
class LoRAOptions:
    """The keys of ``llm.lora``.

    Attributes:
        rank: Rank r of the updates.
        alpha: Updates are scaled by alpha / r.
        dropout: Rate on the updates' inputs in training.
        target: Last part of the adapted layers' names, such as ``("q_proj", "v_proj")``; None
            adapts every linear layer but the output layer.

    Raises:
        ValueError: If an option is out of range.
    """

    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.05
    target: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_low_rank(self.rank, self.alpha, self.dropout, where="llm.lora")
        if isinstance(self.target, str) or (self.target is not None and not self.target):
            raise ValueError(
                f"llm.lora.target must be a list of layer names, got {self.target!r}; leave it out "
                "to adapt every linear layer"
            )


def checked_options(
    lora: Mapping[str, Any] | None,
    quantization: str | None,
    *,
    freeze: bool,
    freeze_embeddings: bool,
) -> LoRAOptions | None:
    """Return the LoRA that a config asks for, if any, after checking that all settings count.

    Raises:
        ValueError: If an option is unknown or out of range, or two of them don't go together.
    """
    if quantization is not None and quantization not in QUANTIZATIONS:
        hint = nearest(quantization, QUANTIZATIONS)
        raise ValueError(f"llm.quantization '{quantization}' is unknown; {hint}")
    if lora is None:
        if quantization is not None and not freeze:
            raise ValueError(
                f"llm.quantization='{quantization}': 4-bit weights can't be trained; add "
                "llm.lora=dict(rank=128, alpha=256), or set llm.freeze=True"
            )
        return None
    for name, value in (("freeze", freeze), ("freeze_embeddings", freeze_embeddings)):
        if value:
            raise ValueError(
                f"llm.{name}=True and llm.lora exclude each other: LoRA freezes all but its "
                f"updates, which have to train; remove {name}, or set lora=None (in a stage that "
                "freezes the LLM)"
            )
    check_arguments(LoRAOptions, lora, where="llm.lora")
    return LoRAOptions(**lora)


def adapt_linears(model: PreTrainedModel, options: LoRAOptions, *, dtype: torch.dtype) -> None:
    """Give the linear layers of a frozen LLM updates that train.

    Args:
        model: The LLM; changed in place.
        options: Which layers, and how.
        dtype: Type of the LLM's weights before quantisation.

    Raises:
        ValueError: If a target names no layer.
    """
    linears = _inner_linears(model)
    names = {path: path.rpartition(".")[2] for path in linears}
    for target in options.target or ():
        if target not in names.values():
            raise ValueError(
                f"llm.lora.target: no linear layer is called '{target}'; "
                f"{nearest(target, names.values())}"
            )
    for path, module in linears.items():
        if options.target is None or names[path] in options.target:
            adapted: Any = module
            kind: Any = type(module)
            adapted.__class__ = _adapted_class(kind)
            adapted.add_update(options, dtype=torch.promote_types(dtype, torch.float32))


def quantize_linears(model: PreTrainedModel) -> None:
    """Turn the linear layers but the output layer into 4-bit ones, in place.

    On a machine with a GPU this is done there, layer by layer, and the layers stay there. On the
    meta device only the layers' classes change.

    Raises:
        ImportError: If bitsandbytes isn't installed.
    """
    bitsandbytes = import_bitsandbytes("llm.quantization='nf4'")
    for path, module in _inner_linears(model).items():
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, _quantized(module, bitsandbytes))


def merged_state_dict(model: PreTrainedModel, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return an LLM's weights with updates merged in and quantisation undone.

    Args:
        model: An LLM, adapted and quantised or not.
        dtype: Type of the merged and the dequantised weights.

    Returns:
        Tensors on the CPU under transformers' names; those of layers without an update are the
        model's own where that is on the CPU, not copies.
    """
    adapted = dict(_special_linears(model))
    wanted = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    wanted |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    plain: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        if name not in wanted or (path in adapted and leaf in ("lora_a", "lora_b")):
            continue
        if path in adapted:  # a quantised layer has cast its bias to the type of its products
            value = _plain_weight(adapted[path], dtype) if leaf == "weight" else value.to(dtype)
        plain[name] = value.cpu()
    return plain


class LowRankUpdate(nn.Module):
    """What an adapted layer has beside its weight; comes first among the bases of its class."""

    in_features: int
    out_features: int
    weight: nn.Parameter

    def add_update(self, options: LoRAOptions, *, dtype: torch.dtype) -> None:
        """Add a zero update; to be called once, when the layer has become of this class."""
        self.lora_a, self.lora_b = zero_update(
            self.in_features,
            self.out_features,
            rank=options.rank,
            dtype=dtype,
            device=self.weight.device,
        )
        self.lora_dropout = nn.Dropout(options.dropout)
        self.lora_scale = options.alpha / options.rank

    def forward(self, x: Tensor) -> Tensor:
        """Project (..., in_features) to (..., out_features)."""
        y = super().forward(x)
        x = self.lora_dropout(x.to(self.lora_a.dtype))
        update = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return y + (self.lora_scale * update).to(y.dtype)

    def extra_repr(self) -> str:
        """Show rank and scale in the printed model."""
        update = f"rank={self.lora_a.shape[0]}, scale={self.lora_scale:g}"
        return f"{super().extra_repr()}, {update}"


def import_bitsandbytes(setting: str) -> ModuleType:
    """Import bitsandbytes.

    Args:
        setting: The config's setting that needs it, for the error.

    Raises:
        ImportError: If it isn't installed.
    """
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ImportError(
            f"{setting} needs the package 'bitsandbytes'; install it with `pip install "
            "bitsandbytes` or `pip install 'covft[train]'`, or remove the setting"
        ) from error


@functools.cache
def _adapted_class(kind: Any) -> type[nn.Module]:
    return type(f"LoRA{kind.__name__}", (LowRankUpdate, kind), {})


def _inner_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the linear layers but the output layer, which may share the embeddings' weight."""
    output = model.get_output_embeddings()
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output
    }


def _special_linears(model: PreTrainedModel) -> dict[str, Any]:
    return {
        path: module
        for path, module in _inner_linears(model).items()
        if isinstance(module, LowRankUpdate) or _is_quantized(module)
    }


def _is_quantized(module: nn.Module) -> bool:
    return getattr(module.weight, "quant_state", None) is not None


def _quantized(linear: nn.Linear, bitsandbytes: ModuleType) -> nn.Module:
    """Return a 4-bit layer with the weight of ``linear``."""
    with torch.device("meta"):  # its initial weights would be thrown away
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
        )
    layer.bias = linear.bias
    layer.weight = bitsandbytes.nn.Params4bit(
        linear.weight.detach(), requires_grad=False, quant_type="nf4", module=layer
    )
    if linear.weight.device.type != "meta":
        layer.to("cuda" if torch.cuda.is_available() else "cpu")  # quantises
    return layer.train(linear.training)


@torch.no_grad()
def _plain_weight(module: Any, dtype: torch.dtype) -> Tensor:
    """Return the weight (out_features, in_features) of an adapted or quantised layer."""
    weight = module.weight.data
    if _is_quantized(module):
        module.state_dict()  # puts a weight that was repacked for a CPU's kernels in order again
        bitsandbytes = importlib.import_module("bitsandbytes")
        weight = bitsandbytes.functional.dequantize_4bit(
            module.weight.data, module.weight.quant_state
        )
    if not isinstance(module, LowRankUpdate):
        return weight.to(dtype)
    return merge_update(weight, module.lora_a, module.lora_b, scale=module.lora_scale, dtype=dtype)
