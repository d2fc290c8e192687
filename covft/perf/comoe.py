"""One CoMoE layer against the same layer written plainly: errors, time, memory for backward.

The plain layer is the paper's formulas, module by module (CoVFT, eq. 7-10): one expert after the
other, attention of the text over the concatenated tokens. Both have the same weights, type, device
and threads; times are medians of interleaved runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from covft.models.checkpointing import saved_bytes
from covft.models.text_encoder import Context
from covft.models.vision.vit import MLP, ViTConfig, activation
from covft.perf.arguments import add_conditions, settings_of
from covft.perf.timing import check_device, conditions, interleaved_medians, num_threads
from covft.vft.comoe import CoMoE, InferenceRouting

#: CLIP's activation, in experts and residual blocks alike.
ACT: Literal["quick_gelu"] = "quick_gelu"
#: CVE's, by default.
NUM_HEADS = 4


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        batch: Image counts I.
        rounds: How often each variant is timed.
        dim: Width D of the tokens; experts are 4 D wide.
        tokens: Tokens N of an image.
        experts: Experts E.
        context_dim: Width C of the text.
        dtype: Name of the type that times and memory are measured in; errors are in float64.
        threads: PyTorch's threads.
        device: "cpu" or "cuda".
    """

    batch: tuple[int, ...] = (1, 4)
    rounds: int = 9
    dim: int = 1024
    tokens: int = 577
    experts: int = 4
    context_dim: int = 768
    dtype: str = "float32"
    threads: int = 1
    device: str = "cpu"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    default = Settings()
    parser.add_argument("--batch", type=int, nargs="+", default=default.batch, help="image counts")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="timings of each run")
    parser.add_argument("--dim", type=int, default=default.dim, help="width of the tokens")
    parser.add_argument("--tokens", type=int, default=default.tokens, help="tokens of an image")
    parser.add_argument("--experts", type=int, default=default.experts)
    parser.add_argument("--context-dim", type=int, default=default.context_dim)
    add_conditions(parser, dtype=default.dtype, threads=default.threads, device=default.device)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the command line asks for; see :func:`measure`."""
    return measure(replace(settings_of(Settings, args), batch=tuple(args.batch)))


def measure(settings: Settings) -> dict[str, Any]:
    """Measure a CoMoE layer against the plain one.

    Returns:
        ``errors`` by mode, in float64: the largest deviation of the ``output`` and of all
        ``gradients`` from the plain layer's, relative to the largest entry of the tensor, and which
        gradient is the ``worst``. ``batches`` by image count:
        ``ms`` medians by pass and variant; ``speedup``, the plain one's median over the variant's;
        ``saved_bytes`` of activations, the input included, by variant; ``saved_ratio`` to the
        plain one's.

    Raises:
        ValueError: If a number isn't positive, the text's width doesn't fit CVE's heads, or there
            is no such device.
    """
    numbers = (*settings.batch, settings.rounds, settings.dim, settings.tokens, settings.threads)
    if min(*numbers, settings.experts, settings.context_dim) < 1:
        raise ValueError(f"sizes, rounds and threads must be at least 1, got {settings}")
    if settings.context_dim % NUM_HEADS:
        raise ValueError(
            f"--context-dim must be a multiple of CVE's {NUM_HEADS} heads, got "
            f"{settings.context_dim}"
        )
    check_device(settings.device)
    with num_threads(settings.threads):
        torch.manual_seed(0)
        errors = _errors(settings)
        layers = _layers(settings, getattr(torch, settings.dtype))
        return {
            "benchmark": "comoe",
            "settings": asdict(settings),
            "conditions": conditions(torch.device(settings.device)),
            "errors": errors,
            "batches": {
                images: _measure_batch(settings, layers, images) for images in settings.batch
            },
        }


def table(result: dict[str, Any]) -> str:
    """Return a result of :func:`measure` as text."""
    lines = [
        f"{key}: {value}" for key, value in (result["settings"] | result["conditions"]).items()
    ]
    for mode, values in result["errors"].items():
        lines.append(
            f"float64 error of {mode}: output {values['output']:.1e}, gradients "
            f"{values['gradients']:.1e} (worst: {values['worst']})"
        )
    for images, batch in result["batches"].items():
        lines += [
            "",
            f"{images} image(s)",
            f"{'pass':<18}{'variant':<18}{'ms':>10}{'speed-up':>10}",
        ]
        for part, times in batch["ms"].items():
            for variant, value in times.items():
                ratio = batch["speedup"][part][variant]
                lines.append(f"{part:<18}{variant:<18}{value:>10.1f}{ratio:>9.2f}x")
        for variant, value in batch["saved_bytes"].items():
            ratio = batch["saved_ratio"][variant]
            name = f"{'saved, MiB/image':<18}{variant:<18}"
            lines.append(f"{name}{value / images / 2**20:>10.1f}{ratio:>9.3f}x")
    return "\n".join(lines)


class PlainCoMoE(nn.Module):
    """Eq. 7-10 as modules, with the names and shapes of the public checkpoints."""

    def __init__(self, *, dim: int, context_dim: int, num_experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 4 * dim), activation(ACT), nn.Linear(4 * dim, dim))
            for _ in range(num_experts)
        )
        self.image_resblock = _PlainResidual(dim)
        self.text_resblock = _PlainResidual(context_dim)
        both = dim + context_dim
        self.cross_attn = nn.MultiheadAttention(
            context_dim, NUM_HEADS, kdim=both, vdim=both, batch_first=True
        )
        self.gate = nn.Linear(context_dim, num_experts)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Mix the experts' outputs for tokens (I, N, D)."""
        image, text = self.image_resblock(x), self.text_resblock(context.pooled)[:, None]
        keys = torch.cat([image, text.expand(-1, image.shape[1], -1)], dim=-1)
        vector, _ = self.cross_attn(text, keys, keys, need_weights=False)
        gates = self.gate(vector[:, 0]).softmax(-1)
        out = gates[:, 0, None, None] * self.experts[0](x)
        for n, expert in enumerate(self.experts[1:], start=1):
            out = out + gates[:, n, None, None] * expert(x)
        return out


class _PlainResidual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.act, self.ln = activation(ACT), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(x + self.fc2(self.act(self.fc1(x))))


@dataclass(frozen=True)
class _Layers:
    """The plain layer, and ours by mode."""

    plain: PlainCoMoE
    ours: dict[str, CoMoE]

    def all(self) -> dict[str, PlainCoMoE | CoMoE]:
        return {"plain": self.plain, **self.ours}


def _layers(settings: Settings, dtype: torch.dtype) -> _Layers:
    """Return the layers with the same random weights."""
    with torch.device(settings.device):
        plain = PlainCoMoE(
            dim=settings.dim, context_dim=settings.context_dim, num_experts=settings.experts
        ).to(dtype)
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        modes = {"ours": False, "ours, recompute": True}
        ours = {name: _ours(settings, recompute).to(dtype) for name, recompute in modes.items()}
    for layer in ours.values():
        layer.load_public_state_dict(plain.state_dict())
    return _Layers(plain, ours)


def _ours(settings: Settings, recompute: bool) -> CoMoE:
    ffn = ViTConfig(
        image_size=14,
        patch_size=14,
        hidden_dim=settings.dim,
        depth=1,
        num_heads=1,
        mlp_dim=4 * settings.dim,
        act=ACT,
    )
    return CoMoE(
        MLP(ffn),
        context_dim=settings.context_dim,
        num_experts=settings.experts,
        activation=ACT,
        recompute=recompute,
    )


def _inputs(settings: Settings, images: int, dtype: torch.dtype) -> tuple[Tensor, Context]:
    with torch.device(settings.device):
        x = torch.randn(images, settings.tokens, settings.dim, dtype=dtype, requires_grad=True)
        text = torch.randn(images, 1, settings.context_dim, dtype=dtype)
        return x, Context(text[:, 0], text, torch.ones(images, 1, dtype=torch.bool))


def _step(layer: nn.Module, x: Tensor, context: Context, grad: Tensor) -> Tensor:
    """Run forward and backward from no gradients, as a training step would."""
    layer.zero_grad(set_to_none=True)
    x.grad = None
    out = layer(x, context)
    out.backward(grad)
    return out


def _errors(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return the float64 deviations of ours from the plain layer, for two images."""
    layers = _layers(settings, torch.float64)
    x, context = _inputs(settings, 2, torch.float64)
    grad = torch.randn_like(x)
    found = {}
    for name, layer in layers.all().items():
        out = _step(layer, x, context, grad)
        found[name] = {"output": out.detach(), "x": _grad(x), **_public_gradients(layer)}
    plain = found.pop("plain")
    return {name: _deviation(tensors, plain) for name, tensors in found.items()}


def _public_gradients(layer: PlainCoMoE | CoMoE) -> dict[str, Tensor]:
    """Return the gradients under the public names; ours loses its weights."""
    if isinstance(layer, PlainCoMoE):
        return {name: _grad(parameter) for name, parameter in layer.named_parameters()}
    with torch.no_grad():  # read through the same map as the weights
        for parameter in layer.parameters():
            parameter.copy_(_grad(parameter))
        for buffer in layer.buffers():  # what softmax makes ineffective
            buffer.zero_()
    return layer.public_state_dict()


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _deviation(found: dict[str, Tensor], plain: dict[str, Tensor]) -> dict[str, Any]:
    assert found.keys() == plain.keys()
    relative = {
        name: float((found[name] - value).abs().max() / value.abs().max())
        for name, value in plain.items()
    }
    output = relative.pop("output")
    worst = max(relative, key=relative.__getitem__)
    return {"output": output, "gradients": relative[worst], "worst": worst}


def _measure_batch(settings: Settings, layers: _Layers, images: int) -> dict[str, Any]:
    dtype = getattr(torch, settings.dtype)
    x, context = _inputs(settings, images, dtype)
    grad = torch.randn_like(x)
    every = layers.all()
    runs: dict[str, dict[str, Callable[[], object]]] = {
        "forward": {name: partial(layer, x, context) for name, layer in every.items()},
        "forward+backward": {
            name: partial(_step, layer, x, context, grad) for name, layer in every.items()
        },
        "inference": _inference_runs(layers, x, context),
    }
    ms: dict[str, dict[str, float]] = {}
    for part, variants in runs.items():
        seconds = interleaved_medians(
            variants, rounds=settings.rounds, device=torch.device(settings.device)
        )
        ms[part] = {name: 1000 * value for name, value in seconds.items()}
    saved = {
        name: saved_bytes(partial(layer, x, context), excluded=layer.parameters())
        for name, layer in every.items()
    }
    return {
        "ms": ms,
        "speedup": {
            part: {name: times["plain"] / value for name, value in times.items()}
            for part, times in ms.items()
        },
        "saved_bytes": saved,
        "saved_ratio": {name: value / saved["plain"] for name, value in saved.items()},
    }


def _inference_runs(
    layers: _Layers, x: Tensor, context: Context
) -> dict[str, Callable[[], object]]:
    """Return what is timed without gradients, routings for inference alone included."""
    ours = layers.ours["ours"]
    num_experts = ours.experts.num_experts
    gates = torch.rand(len(x), num_experts, device=x.device).softmax(-1)
    routings = {"ours": None, "ours, fixed gates": InferenceRouting(gates=gates)}
    for top_k in (2, 1):
        if top_k < num_experts:
            routings[f"ours, top-{top_k}"] = InferenceRouting(top_k=top_k)
    return {
        "plain": partial(_infer, layers.plain, x, context),
        **{
            name: partial(_infer_routed, ours, x, context, routing)
            for name, routing in routings.items()
        },
    }


@torch.no_grad()
def _infer(layer: nn.Module, x: Tensor, context: Context) -> Tensor:
    layer.eval()
    try:
        return layer(x, context)
    finally:
        layer.train()


def _infer_routed(
    layer: CoMoE, x: Tensor, context: Context, routing: InferenceRouting | None
) -> Tensor:
    layer.inference = routing
    try:
        return _infer(layer, x, context)
    finally:
        layer.inference = None
