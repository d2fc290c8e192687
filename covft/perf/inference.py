"""Answering a question about an image: time to the first token, per further token, and by part.

One model with random weights, whose vision tower is CoVFT's or the frozen one in turn, at batch 1.
What CoVFT costs is its visual tokens' time minus the frozen encoder's, without the text encoder's
pass, which is listed apart. CoVFT's gates may also be given once and for all, or all but the
strongest experts left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from mmengine.config import DictAction
from torch import Tensor

from covft.config import load_config, stage_configs
from covft.datasets.collate import Collator
from covft.engine.flops import FlopModel, Work
from covft.models.mllm import MLLM
from covft.models.text_encoder import Context
from covft.perf.arguments import add_conditions
from covft.perf.contenders import Contenders, method_configs
from covft.perf.synthetic import SampleShape, SyntheticDataset, shrunk
from covft.perf.timing import check_device, conditions, interleaved_medians, num_threads
from covft.vft.inference import comoe_layers, inference_routing

_METHODS = ["CoVFT", "Freeze"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    parser.add_argument("config", nargs="?", default="llava15_7b_covft", help="a CoVFT recipe")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--text", type=int, default=60, help="tokens of the prompt's text")
    parser.add_argument("--instruction", type=int, default=20, help="of them, the text encoder's")
    parser.add_argument("--new-tokens", type=int, default=33, help="of the longer answers")
    parser.add_argument("--top-k", type=int, nargs="*", default=[2, 1], help="experts kept")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE")
    add_conditions(parser, dtype="bfloat16", threads=torch.get_num_threads(), device="cuda")
    parser.add_argument("--shrink", action="store_true", help="a tiny model")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the command line asks for.

    Returns:
        ``ms``: medians in milliseconds of ``text encoder``, ``tower, <variant>`` (visual tokens
        from pixels, the projector included, the context given), ``first token, <method>`` (the
        whole prompt) and ``further token, <method>``. ``covft_minus_freeze_ms``: by variant, of the
        towers. ``gflop_first_token``: by method.

    Raises:
        ValueError: If a number isn't positive, the recipe isn't CoVFT's, or there is no such
            device.
    """
    numbers = (args.rounds, args.text, args.instruction, args.new_tokens - 1, args.threads)
    if min(numbers) < 1 or args.text < 4:
        raise ValueError(
            "--rounds, --instruction and --threads must be at least 1, --new-tokens 2, --text 4"
        )
    check_device(args.device, instead="--device cpu --shrink")
    device = torch.device(args.device)
    with num_threads(args.threads), torch.no_grad():
        torch.manual_seed(0)
        contenders = _build(args, device)
        batch = _prompt(contenders.model, args, device)
        seconds = interleaved_medians(
            _runs(contenders, batch, args), rounds=args.rounds, device=device
        )
        gflop = _gflop(contenders, batch)
    names = ("config", "rounds", "text", "instruction", "new_tokens", "top_k", "dtype", "shrink")
    return {
        "benchmark": "inference",
        "settings": {name: getattr(args, name) for name in names},
        "conditions": conditions(device),
        "prompt_tokens": int(batch["input_ids"].shape[1]),
        "gflop_first_token": gflop,
        **_figures(seconds, args.new_tokens),
    }


def table(result: dict[str, Any]) -> str:
    """Return a result of :func:`run` as text."""
    lines = [
        f"{key}: {value}" for key, value in (result["settings"] | result["conditions"]).items()
    ]
    lines += ["", f"a prompt of {result['prompt_tokens']} tokens", f"{'':<34}{'ms':>10}"]
    lines += [f"{name:<34}{value:>10.3f}" for name, value in result["ms"].items()]
    for name, value in result["covft_minus_freeze_ms"].items():
        parts = result["ms"][f"tower, {name}"], result["ms"]["tower, Freeze"]
        lines.append(f"{name} minus Freeze: {value:.3f} ms = {parts[0]:.3f} - {parts[1]:.3f}")
    return "\n".join(lines)


def _build(args: argparse.Namespace, device: torch.device) -> Contenders:
    stage = stage_configs(load_config(args.config, args.cfg_options))[-1][1]
    model_cfg = stage.to_dict()["model"]
    model_cfg["llm"] = {**model_cfg["llm"], "dtype": args.dtype}
    methods = method_configs(_METHODS, model_cfg["vision"].get("vft") or {})
    contenders = Contenders(
        shrunk(model_cfg) if args.shrink else model_cfg, methods, device=device, keep_all=True
    )
    dtype = getattr(torch, args.dtype)
    contenders.model.eval().to(dtype)
    comoe_layers(contenders.towers["CoVFT"])  # refuses a recipe whose towers have none
    return contenders


def _prompt(model: MLLM, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    shape = SampleShape(args.text, supervised=1, context=args.instruction, images=1)
    dataset = SyntheticDataset(model, [shape])
    batch = Collator(dataset.spec)([dataset[0]])
    wanted = ["input_ids", "attention_mask", "pixel_values", "image_to_sample"]
    wanted += ["context_ids", "context_mask"] if model.text_encoder is not None else []
    return {name: batch[name].to(device) for name in wanted}


def _runs(
    contenders: Contenders, batch: Mapping[str, Any], args: argparse.Namespace
) -> dict[str, Callable[[], object]]:
    model = contenders.model
    context: Context | None = None
    runs: dict[str, Callable[[], object]] = {}
    if model.text_encoder is not None:
        encoder, texts = model.text_encoder, (batch["context_ids"], batch["context_mask"])
        context = encoder(*texts).rows(batch["image_to_sample"])
        runs["text encoder"] = lambda: encoder(*texts)

    def visual_tokens(method: str, **routing: Any) -> Callable[[], Tensor]:
        def compute() -> Tensor:
            with _routed(contenders, method, routing):
                return model.projector(model.vision(batch["pixel_values"], context))

        return compute

    def answer(method: str, length: int) -> Callable[[], object]:
        def generate() -> object:
            contenders.choose(method)
            return model.generate(**batch, max_new_tokens=length, min_new_tokens=length)

        return generate

    layers = comoe_layers(contenders.towers["CoVFT"])
    experts = next(iter(layers.values())).experts.num_experts
    gates = {
        index: torch.full((1, experts), 1 / experts, device=batch["input_ids"].device)
        for index in layers
    }
    runs["tower, Freeze"] = visual_tokens("Freeze")
    runs["tower, CoVFT"] = visual_tokens("CoVFT")
    runs["tower, CoVFT, fixed gates"] = visual_tokens("CoVFT", gates=gates)
    for top_k in args.top_k:
        runs[f"tower, CoVFT, top-{top_k}"] = visual_tokens("CoVFT", top_k=top_k)
    for method in _METHODS:
        runs[f"answer of 1, {method}"] = answer(method, 1)
        runs[f"answer of {args.new_tokens}, {method}"] = answer(method, args.new_tokens)
    return runs


@contextmanager
def _routed(contenders: Contenders, method: str, routing: Mapping[str, Any]) -> Iterator[None]:
    contenders.choose(method)
    tower = contenders.towers[method]
    with inference_routing(tower, **routing) if routing else nullcontext():
        yield


def _figures(seconds: Mapping[str, float], new_tokens: int) -> dict[str, Any]:
    ms = {k: 1000 * v for k, v in seconds.items() if not k.startswith("answer")}
    for method in _METHODS:
        first = 1000 * seconds[f"answer of 1, {method}"]
        whole = 1000 * seconds[f"answer of {new_tokens}, {method}"]
        ms[f"first token, {method}"] = first
        ms[f"further token, {method}"] = (whole - first) / (new_tokens - 1)
    variants = [name.removeprefix("tower, ") for name in ms if name.startswith("tower, CoVFT")]
    minus = {name: ms[f"tower, {name}"] - ms["tower, Freeze"] for name in variants}
    return {"ms": ms, "covft_minus_freeze_ms": minus}


def _gflop(contenders: Contenders, batch: Mapping[str, Any]) -> dict[str, float]:
    labels = torch.full_like(batch["input_ids"], -100)
    found = {}
    for method in _METHODS:
        contenders.choose(method)
        work = Work.of({**batch, "labels": labels})
        found[method] = FlopModel(contenders.model).generation(work, new_tokens=1) / 1e9
    return found
