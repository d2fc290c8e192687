"""All that is to be measured on a GPU, in one call of at most eight minutes.

Training steps of LLaVA-1.5-7B on one GPU, inference, the encoder's step, the CoMoE layer and the
language-model loss, each in a process of its own: one that fails, or runs out of memory or time,
takes no other with it. Results are written after each, as JSON and as Markdown; of a part that
takes too long, what it has finished counts. A suite that is interrupted ends its process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from covft.atomic import atomic_write_text
from covft.config import CONFIG_ROOT
from covft.perf.timing import conditions

JSON_NAME, MARKDOWN_NAME = "gpu_suite.json", "gpu_suite.md"
#: Less isn't worth a process's start.
_LEAST_SECONDS = 15.0
#: Share of a part's time that is left for its imports, building and compiling.
_START_SHARE = 0.25
_ERROR_LINES = 12
#: A part that takes longer than its time is ended once it has taken so many times as much.
_PATIENCE = 1.3


@dataclass(frozen=True)
class Part:
    """One benchmark of the suite.

    Attributes:
        name: Its command.
        share: Of the time; what earlier parts leave goes to the later ones.
        arguments: Its command line on a GPU, given the seconds it has.
        dry: Its command line at tiny size on a CPU.
        partial: Whether it takes ``--partial``, a file for the result so far.
    """

    name: str
    share: float
    arguments: Callable[[float], list[str]]
    dry: list[str]
    partial: bool = False


def parts(recipe: str) -> list[Part]:
    """Return the suite's parts, the one that matters most first."""
    methods = ["--methods", "CoVFT", "Full", "Freeze"]
    tiny = ["--shrink", "--device", "cpu"]
    return [
        Part(
            "train",
            0.55,
            lambda seconds: [
                *("train", recipe, *methods, "--device", "cuda", "--samples", "32"),
                *("--steps", "8", "--seconds", f"{(1 - _START_SHARE) * seconds:.0f}"),
            ],
            ["train", recipe, *methods, *tiny, "--steps", "1", "--warmup", "0"],
            partial=True,
        ),
        Part(
            "inference",
            0.15,
            lambda seconds: ["inference", "--device", "cuda"],
            ["inference", *tiny, "--rounds", "1", "--new-tokens", "2", "--dtype", "float32"],
        ),
        Part(
            "vit-step",
            0.12,
            lambda seconds: [
                *("vit-step", "--encoders", "clip-l-336", "internvit-300m-448", *methods),
                *("--device", "cuda", "--dtype", "bfloat16", "--images", "32"),
            ],
            [
                *("vit-step", *methods, *tiny, "--images", "1", "--rounds", "1"),
                *("--context-dim", "32"),
            ],
        ),
        Part(
            "comoe",
            0.09,
            lambda seconds: [
                *("comoe", "--device", "cuda", "--dtype", "bfloat16", "--batch", "1", "32")
            ],
            [
                *("comoe", "--dim", "32", "--tokens", "9", "--context-dim", "24"),
                *("--batch", "1", "--rounds", "1"),
            ],
        ),
        Part(
            "lmloss",
            0.09,
            lambda seconds: ["lmloss", "--device", "cuda", "--dtype", "bfloat16"],
            [
                *("lmloss", "--tokens", "16", "--hidden", "16", "--vocabulary", "64"),
                *("--rounds", "1"),
            ],
        ),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    parser.add_argument("--recipe", default="llava15_7b_covft_80gb", help="of the training steps")
    parser.add_argument("--seconds", type=float, default=470.0, help="for all parts together")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_suite"), help="folder")
    parser.add_argument("--only", nargs="+", help="names of parts")
    parser.add_argument(
        "--dry-run", action="store_true", help="the same path at tiny size, on the CPU"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the parts; write the folder's files after each.

    Returns:
        ``parts``: by name its ``status`` ("ok", "failed", "timed out", or "cut": its time ended
        after a part of its steps, or before it began), ``command``, ``seconds``, and the ``result``
        or ``error``, both where it has failed or was cut after some steps. ``failed``: names of
        those that failed or have no result.

    Raises:
        ValueError: If there is no GPU, or no such part.
    """
    known = {part.name: part for part in parts(args.recipe)}
    for name in args.only or ():
        if name not in known:
            raise ValueError(f"--only {name}: the parts are {', '.join(known)}")
    if not args.dry_run and not torch.cuda.is_available():
        raise ValueError(
            f"no CUDA device is seen by PyTorch {torch.__version__}; --dry-run takes the same path "
            "at tiny size on the CPU"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        print(
            "bitsandbytes isn't installed: recipes with 8-bit optimizers, such as the default one, "
            "need it (pip install 'covft[train]')",
            file=sys.stderr,
        )
    chosen = [part for name, part in known.items() if not args.only or name in args.only]
    device = torch.device("cpu" if args.dry_run else "cuda")
    result: dict[str, Any] = {
        "benchmark": "gpu-suite",
        "settings": {"recipe": args.recipe, "seconds": args.seconds, "dry_run": args.dry_run},
        "conditions": conditions(device),
        "parts": {},
        "failed": [],
    }
    texts: dict[str, str] = {}
    ends = time.monotonic() + args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    with _ended_by_sigterm():
        for index, part in enumerate(chosen):
            left = ends - time.monotonic()
            seconds = left * part.share / sum(later.share for later in chosen[index:])
            limit = min(left, _PATIENCE * seconds)
            found, shown = _run_part(
                part, seconds, limit=limit, dry_run=args.dry_run, folder=args.out
            )
            result["parts"][part.name] = found
            if found["status"] == "failed" or "result" not in found:
                result["failed"].append(part.name)
            texts[part.name] = shown
            print(f"{part.name}: {found['status']}, {found['seconds']:.0f} s", file=sys.stderr)
            atomic_write_text(args.out / JSON_NAME, json.dumps(result, indent=2) + "\n")
            atomic_write_text(args.out / MARKDOWN_NAME, markdown(result, texts))
    return result


def table(result: dict[str, Any]) -> str:
    """Return a result of :func:`run` as text, without the parts' own tables."""
    return markdown(result, {})


def markdown(result: Mapping[str, Any], texts: Mapping[str, str]) -> str:
    """Return a result of :func:`run`, finished or not, as Markdown.

    Args:
        result: The result.
        texts: The tables that the parts have printed, or what went wrong, by name.
    """
    stated = {**result["settings"], **result["conditions"]}
    lines = [
        "# GPU suite",
        "",
        "; ".join(f"{key}: {value}" for key, value in stated.items()),
        "",
        "| part | status | seconds |",
        "|---|---|---|",
    ]
    for name, part in result["parts"].items():
        lines.append(f"| {name} | {part['status']} | {part['seconds']:.0f} |")
    steps = result["parts"].get("train", {}).get("result")
    if steps is not None:
        lines += ["", *_train_table(steps)]
    for name, text in texts.items():
        command = " ".join(result["parts"][name]["command"])
        lines += ["", f"## {name}", "", f"`{command}`", "", "```text", text, "```"]
    return "\n".join(lines) + "\n"


def _train_table(steps: Mapping[str, Any]) -> list[str]:
    lines = [
        "| method | s/step | samples/s | tokens/s | TFLOP/s | MFU | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, found in steps["methods"].items():
        if "error" in found:
            lines.append(f"| {method} | {found['error']} | | | | | |")
            continue
        mfu = "-" if found["mfu"] is None else f"{found['mfu']:.1%}"
        peak = "-" if found["peak_gib"] is None else f"{found['peak_gib']:.1f}"
        lines.append(
            f"| {method} | {found['seconds']:.3f} | {found['samples_per_second']:.2f} | "
            f"{found['input_tokens_per_second']:.0f} | {found['tflops']:.4g} | {mfu} | {peak} |"
        )
    lines += ["", "| ratio | of | value | numerator | denominator |", "|---|---|---|---|---|"]
    for pair, quantities in steps["ratios"].items():
        for quantity, value in quantities.items():
            lines.append(
                f"| {pair} | {quantity} | {value['ratio']:.3f} | {value['numerator']:.4g} | "
                f"{value['denominator']:.4g} |"
            )
    return lines


def _run_part(
    part: Part, seconds: float, *, limit: float, dry_run: bool, folder: Path
) -> tuple[dict[str, Any], str]:
    """Run a part's command in a process of its own.

    Args:
        part: The part.
        seconds: What it should take.
        limit: When it is ended.
        dry_run: Run it at tiny size.
        folder: For the result so far, removed when the part has ended.

    Returns:
        What belongs into the result, and the table that it printed or what went wrong.
    """
    arguments = part.dry if dry_run else part.arguments(seconds)
    partial = folder / f"{part.name}.partial.json"
    partial.unlink(missing_ok=True)  # of a suite that was interrupted
    if part.partial:
        arguments = [*arguments, "--partial", str(partial)]
    found: dict[str, Any] = {"status": "cut", "command": arguments, "seconds": 0.0}
    if seconds < _LEAST_SECONDS:
        found["error"] = f"cut: {max(0.0, seconds):.0f} s were left for it"
        return found, found["error"]
    started = time.monotonic()
    status, output, errors = _run(arguments, limit, dry_run=dry_run)
    found |= {"status": status, "seconds": time.monotonic() - started}
    if status == "ok":
        partial.unlink(missing_ok=True)
        *lines, last = output.strip().splitlines()
        return {**found, "result": json.loads(last)}, "\n".join(lines)
    tail = [line for line in f"{output}\n{errors}".splitlines() if line.strip()]
    found["error"] = "\n".join(tail[-_ERROR_LINES:])
    if not partial.exists():
        return found, found["error"]
    found["result"] = json.loads(partial.read_text(encoding="utf-8"))
    if status == "timed out":
        found |= {"status": "cut", "error": f"its time ended after {found['seconds']:.0f} s"}
    partial.unlink()
    from covft.perf import train  # brings the models along, which this process has no use for

    return found, f"{train.table(found['result'])}\n\n{found['status']}: {found['error']}"


def _run(arguments: list[str], limit: float, *, dry_run: bool) -> tuple[str, str, str]:
    """Run a command line of the tool; return its status and what it wrote to stdout and stderr."""
    script = CONFIG_ROOT.parent / "tools" / "benchmark.py"
    process = subprocess.Popen(
        # malloc is set by this process, whose environment it gets.
        [sys.executable, str(script), *arguments, "--malloc", "default"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(dry_run=dry_run),
        start_new_session=True,  # so that what it starts can be ended with it
    )
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        return "timed out", output, errors
    finally:
        if process.poll() is None:  # the suite is interrupted, of which this session hears nothing
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "failed" if process.returncode else "ok", output, errors


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise SystemExit, so that what is to be cleaned up is."""

    def leave(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _environment(*, dry_run: bool) -> dict[str, str]:
    paths = [str(CONFIG_ROOT.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    # Towers and steps of changing sizes would otherwise leave the GPU's memory in pieces.
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if dry_run:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment
