"""Policies of activation checkpointing, for a ViT and an LLM: bytes kept for backward, step time.

Both are stacks of the real blocks at random weights: CLIP's ViT, and Llama's layers, which get a
packed row of two samples. Each policy's gradients are compared with those of "none".

``saved_bytes`` is what autograd saves; a selective policy keeps more by other means. ``kept_bytes``
is what the allocator has handed out, and not got back, after the forward pass, output included.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from covft.models.checkpointing import Setting, saved_bytes
from covft.models.llm import CausalLM
from covft.models.vision.vit import ViT, ViTConfig
from covft.perf.arguments import add_conditions, settings_of
from covft.perf.peak_memory import peak_memory
from covft.perf.timing import check_device, conditions, interleaved_medians, num_threads

_PATCH = 14


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        depth: Blocks of each stack.
        dim: Width of both; a multiple of 64, which is a head's.
        grid: Patches per side of an image.
        images: Images of the ViT's batch.
        tokens: Length of the LLM's row.
        rounds: How often each policy is timed.
        dtype: Name of the parameters' and activations' type.
        threads: PyTorch's threads.
        device: "cpu" or "cuda".
    """

    depth: int = 8
    dim: int = 512
    grid: int = 14
    images: int = 1
    tokens: int = 384
    rounds: int = 5
    dtype: str = "float32"
    threads: int = 1
    device: str = "cpu"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    default = Settings()
    parser.add_argument("--depth", type=int, default=default.depth, help="blocks")
    parser.add_argument("--dim", type=int, default=default.dim, help="width, a multiple of 64")
    parser.add_argument("--grid", type=int, default=default.grid, help="patches per side")
    parser.add_argument("--images", type=int, default=default.images)
    parser.add_argument("--tokens", type=int, default=default.tokens, help="of the LLM's row")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="timings of each policy")
    add_conditions(parser, dtype=default.dtype, threads=default.threads, device=default.device)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the command line asks for; see :func:`measure`."""
    return measure(settings_of(Settings, args))


def measure(settings: Settings) -> dict[str, Any]:
    """Measure every policy on both stacks.

    Returns:
        By stack and policy: ``setting``, ``saved_bytes``, ``kept_bytes``, ``ms`` of a step, the
        ``…_ratio`` of each to "none", and the ``error`` of its gradients, relative to each tensor's
        largest entry.

    Raises:
        ValueError: If a number isn't positive, or the device is missing.
    """
    numbers = (settings.dim, settings.grid, settings.images, settings.tokens - 1, settings.rounds)
    if min(*numbers, settings.depth - 1, settings.threads) < 1 or settings.dim % 64:
        raise ValueError(
            "sizes must be at least 1 (--depth and --tokens 2) and --dim a multiple of 64, got "
            f"{settings}"
        )
    check_device(settings.device)
    with num_threads(settings.threads):
        return {
            "benchmark": "checkpointing",
            "settings": asdict(settings),
            "conditions": conditions(torch.device(settings.device)),
            "stacks": {
                "vit": _measure_stack(settings, *_vit(settings)),
                "llm": _measure_stack(settings, *_llm(settings)),
            },
        }


def table(result: Mapping[str, Any]) -> str:
    """Return a result of :func:`measure` as text."""
    lines = [
        f"{key}: {value}" for key, value in (result["settings"] | result["conditions"]).items()
    ]
    columns = ("saved_bytes", "kept_bytes")
    for stack, policies in result["stacks"].items():
        heads = "".join(f"{name.replace('_bytes', ', MiB'):>14}{'ratio':>8}" for name in columns)
        lines += ["", f"{stack:<12}{heads}{'ms':>10}{'ratio':>8}{'error':>10}"]
        for name, found in policies.items():
            cells = "".join(
                f"{found[column] / 2**20:>14.1f}{found[column.replace('bytes', 'ratio')]:>7.3f}x"
                for column in columns
            )
            lines.append(
                f"{name:<12}{cells}{found['ms']:>10.1f}{found['ms_ratio']:>7.2f}x"
                f"{found['error']:>10.1e}"
            )
    return "\n".join(lines)


#: A stack, and its forward pass.
_Stack = tuple[Any, Callable[[Any], Tensor]]


def _vit(settings: Settings) -> _Stack:
    config = ViTConfig(
        image_size=_PATCH * settings.grid,
        patch_size=_PATCH,
        hidden_dim=settings.dim,
        depth=settings.depth,
        num_heads=settings.dim // 64,
        mlp_dim=4 * settings.dim,
        act="quick_gelu",
    )
    torch.manual_seed(0)
    dtype = getattr(torch, settings.dtype)
    with torch.device(settings.device):
        model = ViT(config).to(dtype).train()
        size = config.image_size
        pixels = torch.randn(settings.images, 3, size, size, dtype=dtype)
    return model, lambda stack: stack(pixels)


def _llm(settings: Settings) -> _Stack:
    arch = {
        "model_type": "llama",
        "vocab_size": 8,  # embeddings and output layer play no part
        "hidden_size": settings.dim,
        "intermediate_size": 8 * settings.dim // 3,
        "num_hidden_layers": settings.depth,
        "num_attention_heads": settings.dim // 64,
    }
    torch.manual_seed(0)
    with torch.device(settings.device):
        model = CausalLM(arch=arch, dtype=settings.dtype).train()
        embeds = torch.randn(1, settings.tokens, settings.dim, dtype=model.dtype)
        half = settings.tokens // 2
        bounds = torch.tensor([0, half, settings.tokens], dtype=torch.int32)
        positions = torch.cat([torch.arange(half), torch.arange(settings.tokens - half)])[None]
    embeds.requires_grad_()
    return model, lambda stack: stack.hidden_states(
        embeds, position_ids=positions, cu_seqlens=bounds
    )


def _measure_stack(
    settings: Settings, model: Any, forward: Callable[[Any], Tensor]
) -> dict[str, dict[str, Any]]:
    device = torch.device(settings.device)
    expected = _gradients(model, forward)
    without = _saved_bytes(model, forward)
    policies: dict[str, Setting] = {
        "none": False,
        "selective": "selective",
        "half": 0.5,
        "budget": {"budget_gb": 0.5 * without / 1e9},
        "full": True,
    }
    steps: dict[str, Callable[[], None]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, setting in policies.items():
        stack = copy.deepcopy(model)
        stack.checkpointing = setting
        forward(stack)  # a budget measures its blocks
        steps[name] = partial(_step, stack, forward)
        found[name] = {
            "setting": setting,
            "error": _error(_gradients(stack, forward), expected),
            "saved_bytes": _saved_bytes(stack, forward),
            "kept_bytes": _kept_bytes(stack, forward, device),
        }
    seconds = interleaved_medians(steps, rounds=settings.rounds, device=device)
    for name, values in found.items():
        values["ms"] = 1000 * seconds[name]
        for key in ("saved_bytes", "kept_bytes", "ms"):
            values[f"{key.removesuffix('_bytes')}_ratio"] = values[key] / found["none"][key]
    return found


def _saved_bytes(model: nn.Module, forward: Callable[[Any], Tensor]) -> int:
    return saved_bytes(lambda: forward(model), excluded=model.parameters())


def _kept_bytes(model: nn.Module, forward: Callable[[Any], Tensor], device: torch.device) -> int:
    outputs = []
    return peak_memory(lambda: outputs.append(forward(model)), device=device).kept


def _step(model: nn.Module, forward: Callable[[Any], Tensor]) -> None:
    model.zero_grad(set_to_none=True)
    forward(model).float().square().mean().backward()


def _gradients(model: nn.Module, forward: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    _step(model, forward)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - value).abs().max() / value.abs().max())
        for name, value in expected.items()
    )
