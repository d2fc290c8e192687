"""The language-model loss on supervised positions against full logits: errors, time, memory.

Three ways, from the decoder's last states to the loss and back to the gradients of states and
output layer:

* full logits: transformers' own, logits of every position and ``ForCausalLMLoss``;
* supervised logits: those of the supervised positions, and PyTorch's cross-entropy;
* ours: :func:`covft.models.lm_loss.supervised_loss`.

Memory is what PyTorch's allocator has at the peak, over a baseline: weights, states and the
gradients of both, which are the result and the same in every way. The peak over weights and states
alone is given, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from covft.conversation import IGNORE_INDEX
from covft.models.lm_loss import as_output_layer, supervised_loss
from covft.perf.arguments import add_conditions, settings_of
from covft.perf.peak_memory import peak_memory
from covft.perf.timing import conditions, interleaved_medians, num_threads


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        tokens: Positions T; 884 is LLaVA-1.5's mean (576 visual, 308 of text).
        supervised: Share of them with a label.
        hidden: Width H of the states.
        vocabulary: Words V.
        freeze: Leave the output layer alone: no gradient of it.
        rounds: How often each way is timed.
        dtype: Name of the type that times and memory are measured in; errors are in float64.
        threads: PyTorch's threads.
        device: "cpu" or "cuda".
    """

    tokens: int = 884
    supervised: float = 0.16
    hidden: int = 2048
    vocabulary: int = 32000
    freeze: bool = False
    rounds: int = 3
    dtype: str = "float32"
    threads: int = 1
    device: str = "cpu"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    default = Settings()
    parser.add_argument("--tokens", type=int, default=default.tokens, help="positions")
    parser.add_argument(
        "--supervised", type=float, default=default.supervised, help="share of them with a label"
    )
    parser.add_argument("--hidden", type=int, default=default.hidden, help="width of the states")
    parser.add_argument("--vocabulary", type=int, default=default.vocabulary, help="words")
    parser.add_argument("--freeze", action="store_true", help="don't train the output layer")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="timings of each way")
    add_conditions(parser, dtype=default.dtype, threads=default.threads, device=default.device)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure with the command line's options."""
    return measure(settings_of(Settings, args))


def measure(settings: Settings) -> dict[str, Any]:
    """Return errors, times and memory of each way, and their ratios to full logits.

    Raises:
        ValueError: If no position, or not even the first, is left without a label.
    """
    count = round(settings.supervised * settings.tokens)
    if not 0 < count < settings.tokens:
        raise ValueError(
            f"--supervised {settings.supervised} of --tokens {settings.tokens} are {count} "
            f"positions; 1 to {settings.tokens - 1} are possible: the first has no label"
        )
    torch.manual_seed(0)
    device = torch.device(settings.device)
    with num_threads(settings.threads):
        ways = _ways(settings, getattr(torch, settings.dtype))
        seconds = interleaved_medians(ways, rounds=settings.rounds, device=device)
        memory = {name: asdict(peak_memory(way, device=device)) for name, way in ways.items()}
        full = memory["full logits"]
        return {
            "benchmark": "lmloss",
            "settings": asdict(settings),
            "conditions": conditions(device),
            "supervised_positions": count,
            "errors": _errors(settings),
            "ms": {name: 1000 * value for name, value in seconds.items()},
            "speedup": {name: seconds["full logits"] / value for name, value in seconds.items()},
            "bytes": memory,
            "memory_ratio": {n: m["temporary"] / full["temporary"] for n, m in memory.items()},
            "peak_ratio": {n: m["peak"] / full["peak"] for n, m in memory.items()},
        }


def table(result: dict[str, Any]) -> str:
    """Return a result as a table."""
    settings, conditions = result["settings"], result["conditions"]
    lines = [
        f"{result['supervised_positions']} supervised of {settings['tokens']} positions, "
        f"H {settings['hidden']}, V {settings['vocabulary']}, {settings['dtype']}, output layer "
        f"{'frozen' if settings['freeze'] else 'trained'}; {conditions['device']}, "
        f"{conditions['threads']} threads",
        "forward + backward; MiB at the peak, over weights, states and their gradients, and over "
        "weights and states",
        f"{'':18} {'ms':>9} {'speed':>7} {'MiB':>8} {'ratio':>7} {'MiB':>8} {'ratio':>7}"
        f" {'error':>8}",
    ]
    for name, ms in result["ms"].items():
        held = result["bytes"][name]
        lines.append(
            f"{name:18} {ms:9.1f} {result['speedup'][name]:6.2f}x"
            f" {held['temporary'] / 2**20:8.1f} {result['memory_ratio'][name]:6.3f}x"
            f" {held['peak'] / 2**20:8.1f} {result['peak_ratio'][name]:6.3f}x"
            f" {result['errors'].get(name, 0):8.1e}"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class _Inputs:
    """The output layer, states (T, H) and labels (T,), as a decoder would leave them."""

    head: nn.Linear
    states: Tensor
    labels: Tensor

    def learnt(self) -> list[Tensor]:
        """Return what gets a gradient."""
        return [x for x in (self.states, self.head.weight) if x.requires_grad]


def _inputs(settings: Settings, dtype: torch.dtype) -> _Inputs:
    count = round(settings.supervised * settings.tokens)
    with torch.device(settings.device):
        head = nn.Linear(settings.hidden, settings.vocabulary, bias=False, dtype=dtype)
        states = torch.randn(settings.tokens, settings.hidden, dtype=dtype, requires_grad=True)
        labels = torch.full((settings.tokens,), IGNORE_INDEX)
        # An answer is a run of positions, at the end.
        labels[-count:] = torch.randint(settings.vocabulary, (count,))
    as_output_layer(head)
    head.requires_grad_(not settings.freeze)
    return _Inputs(head, states, labels)


def _full_loss(inputs: _Inputs) -> Tensor:
    logits = inputs.head(inputs.states)
    count = (inputs.labels != IGNORE_INDEX).sum()
    return ForCausalLMLoss(
        logits[None], inputs.labels[None], vocab_size=logits.shape[-1], num_items_in_batch=count
    )


def _supervised(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    targets = inputs.labels[1:]
    supervised = targets != IGNORE_INDEX
    return inputs.states[:-1][supervised], targets[supervised]


def _supervised_logits_loss(inputs: _Inputs) -> Tensor:
    states, targets = _supervised(inputs)
    logits = inputs.head(states)
    exact = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(exact), targets)


def _our_loss(inputs: _Inputs) -> Tensor:
    states, targets = _supervised(inputs)
    return supervised_loss(inputs.head, states, targets) / len(targets)


_LOSSES: dict[str, Callable[[_Inputs], Tensor]] = {
    "full logits": _full_loss,
    "supervised logits": _supervised_logits_loss,
    "ours": _our_loss,
}


def _ways(settings: Settings, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    inputs = _inputs(settings, dtype)
    return {name: partial(_step, loss, inputs) for name, loss in _LOSSES.items()}


def _step(loss: Callable[[_Inputs], Tensor], inputs: _Inputs) -> None:
    """Run forward and backward from no gradients, as a training step would."""
    for tensor in inputs.learnt():
        tensor.grad = None
    loss(inputs).backward()


def _errors(settings: Settings) -> dict[str, float]:
    """Return the largest relative deviations from a plain cross-entropy, in float64 and small."""
    small = replace(
        settings,
        tokens=min(settings.tokens, 200),
        hidden=min(settings.hidden, 64),
        vocabulary=min(settings.vocabulary, 1000),
    )
    inputs = _inputs(small, torch.float64)
    found = {}
    for name in ("plain", "supervised logits", "ours"):
        loss = _LOSSES.get(name, _plain_loss)
        _step(loss, inputs)
        gradients = [x.grad for x in inputs.learnt() if x.grad is not None]
        found[name] = [loss(inputs).detach(), *gradients]
    plain = found.pop("plain")
    return {
        name: max(
            float((one - other).abs().max() / other.abs().max())
            for one, other in zip(tensors, plain, strict=True)
        )
        for name, tensors in found.items()
    }


def _plain_loss(inputs: _Inputs) -> Tensor:
    """The full loss without transformers' cast to float32."""
    return F.cross_entropy(
        inputs.head(inputs.states)[:-1], inputs.labels[1:], ignore_index=IGNORE_INDEX
    )
