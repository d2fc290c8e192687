"""Forward and backward of the vision encoder by VFT method: time, images a second, memory kept.

Random weights, pixels and text features. Methods take turns in one process; each encoder runs at
its published size. Parameters are of ``--dtype``; with bfloat16 there is no autocast.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from covft.config import CONFIG_ROOT, load_config, stage_configs
from covft.engine.flops import peak_tflops
from covft.engine.flops.vision import tower_flops
from covft.models.checkpointing import saved_bytes
from covft.models.text_encoder import Context
from covft.models.vision.tower import VisionTower
from covft.perf.arguments import add_conditions
from covft.perf.contenders import method_configs, random_tower
from covft.perf.synthetic import TINY_VISION
from covft.perf.timing import check_device, conditions, interleaved_medians, num_threads
from covft.registry import nearest

#: A recipe of each encoder, whose ``vision_backbone`` is measured.
ENCODERS = {
    "clip-l-336": "llava15_7b_covft",
    "siglip-l-384": "llava15_7b_siglip_covft",
    "dinov3-l-384": "llava15_7b_dinov3_covft",
    "internvit-300m-448": "internvl2_covft",
    "dinov2-s": "quickstart_covft",
}
#: What other methods' times are divided by, where it is measured.
REFERENCE = "Full"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    parser.add_argument("--encoders", nargs="+", default=["clip-l-336"], help=", ".join(ENCODERS))
    parser.add_argument("--methods", nargs="+", default=["CoVFT", "Full", "Freeze"])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--text-tokens", type=int, default=64, help="of each image's instruction")
    parser.add_argument("--context-dim", type=int, default=768)
    add_conditions(parser, dtype="float32", threads=torch.get_num_threads(), device="cpu")
    parser.add_argument("--shrink", action="store_true", help="narrow encoders of small images")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the command line asks for.

    Returns:
        ``encoders``: by encoder and method ``forward`` and ``step`` (forward and backward) in
        milliseconds, ``images_per_second`` of steps, ``tflops`` and ``mfu`` (None without a known
        peak) of steps, ``saved_mib`` that the backward pass keeps per image, ``trainable``
        parameters; and ``step_ratio``, to full fine-tuning's step where that is measured.

    Raises:
        ValueError: If an encoder or method is unknown, a number isn't positive, or there is no such
            device.
    """
    numbers = (args.images, args.rounds, args.text_tokens, args.context_dim, args.threads)
    if min(numbers) < 1:
        raise ValueError(f"sizes, rounds and threads must be at least 1, got {numbers}")
    check_device(args.device)
    device = torch.device(args.device)
    names = ("images", "rounds", "text_tokens", "context_dim", "dtype", "shrink")
    with num_threads(args.threads):
        torch.manual_seed(0)
        return {
            "benchmark": "vit-step",
            "settings": {name: getattr(args, name) for name in names},
            "conditions": conditions(device),
            "encoders": {name: _encoder(name, args, device) for name in args.encoders},
        }


def table(result: dict[str, Any]) -> str:
    """Return a result of :func:`run` as text."""
    lines = [
        f"{key}: {value}" for key, value in (result["settings"] | result["conditions"]).items()
    ]
    head = ("fwd ms", "step ms", "/ Full", "images/s", "TFLOP/s", "MFU", "MiB/image")
    for encoder, methods in result["encoders"].items():
        lines += ["", f"{encoder:<22}" + "".join(f"{name:>11}" for name in head)]
        for method, found in methods.items():
            ratio, mfu = found["step_ratio"], found["mfu"]
            numbers = (
                f"{found['forward']:.4g}",
                f"{found['step']:.4g}",
                "-" if ratio is None else f"{ratio:.3f}",
                f"{found['images_per_second']:.4g}",
                f"{found['tflops']:.4g}",
                "-" if mfu is None else f"{mfu:.1%}",
                f"{found['saved_mib']:.4g}",
            )
            lines.append(f"{method:<22}" + "".join(f"{number:>11}" for number in numbers))
    return "\n".join(lines)


def _encoder(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    if name not in ENCODERS:
        raise ValueError(f"--encoders {name}: {nearest(name, ENCODERS)}")
    vision = _vision_config(name, shrink=args.shrink)
    dtype = getattr(torch, args.dtype)
    towers = {
        method: random_tower(
            {**vision, "vft": cfg}, device=device, context_dim=args.context_dim
        ).to(dtype)
        for method, cfg in method_configs(args.methods, {}).items()
    }
    any_tower = next(iter(towers.values()))
    side = any_tower.backbone.image_spec.image_size
    pixels = torch.randint(0, 256, (args.images, 3, side, side), dtype=torch.uint8, device=device)
    tokens = torch.randn(
        args.images, args.text_tokens, args.context_dim, dtype=dtype, device=device
    )
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=device)
    context = Context(tokens[:, 0], tokens, mask)
    runs: dict[str, Callable[[], object]] = {}
    for method, tower in towers.items():
        runs[f"{method} forward"] = partial(_forward, tower, pixels, context)
        runs[f"{method} step"] = partial(_step, tower, pixels, context)
    seconds = interleaved_medians(runs, rounds=args.rounds, device=device)
    peak = peak_tflops(torch.cuda.get_device_name(device)) if args.device == "cuda" else None
    reference = seconds.get(f"{REFERENCE} step")
    return {
        method: _figures(tower, seconds, method, pixels, context, peak=peak, reference=reference)
        for method, tower in towers.items()
    }


def _vision_config(name: str, *, shrink: bool) -> dict[str, Any]:
    """Return ``model.vision`` of the encoder's recipe, without weights, method, checkpointing."""
    stage = stage_configs(load_config(CONFIG_ROOT / f"{ENCODERS[name]}.py"))[-1][1]
    vision = dict(stage.to_dict()["model"]["vision"])
    dropped = ("weights", "checkpointing") + (("image_size", "grid", "arch") if shrink else ())
    backbone = {k: v for k, v in dict(vision["backbone"]).items() if k not in dropped}
    vision["backbone"] = {**backbone, "arch": TINY_VISION} if shrink else backbone
    return vision


def _figures(
    tower: VisionTower,
    seconds: Mapping[str, float],
    method: str,
    pixels: Tensor,
    context: Context,
    *,
    peak: float | None,
    reference: float | None,
) -> dict[str, Any]:
    step = seconds[f"{method} step"]
    flops = tower_flops(tower, text_tokens=context.tokens.shape[1]).flops
    tflops = flops.total * len(pixels) / step / 1e12
    saved = saved_bytes(lambda: tower(pixels, context), excluded=tower.parameters())
    return {
        "forward": 1000 * seconds[f"{method} forward"],
        "step": 1000 * step,
        "step_ratio": None if reference is None else step / reference,
        "images_per_second": len(pixels) / step,
        "gflop_per_image": flops.total / 1e9,
        "tflops": tflops,
        "mfu": None if peak is None else tflops / peak,
        "saved_mib": saved / len(pixels) / 2**20,
        "trainable": sum(p.numel() for p in tower.parameters() if p.requires_grad),
    }


@torch.no_grad()
def _forward(tower: VisionTower, pixels: Tensor, context: Context) -> Tensor:
    return tower(pixels, context)


def _step(tower: VisionTower, pixels: Tensor, context: Context) -> Tensor:
    """Run forward and, where something trains, backward, as a training step would."""
    tower.zero_grad(set_to_none=True)
    features: Tensor = tower(pixels, context)
    if features.requires_grad:
        features.backward(torch.ones_like(features))
    return features
