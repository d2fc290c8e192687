"""Export a run: load it, write it beside its place, compare, then give it its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from covft.checkpoints.export import hf, hf_llava, public
from covft.checkpoints.export.folder import UnverifiedExportError, convert_weights, new_folder
from covft.checkpoints.export.probe import Probe
from covft.checkpoints.export.source import Source
from covft.checkpoints.run import load_run
from covft.registry import nearest

#: Largest difference of float32 logits, relative to the largest: sums in another order.
TOLERANCE = 1e-4
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Format:
    """A way to export.

    Attributes:
        holds: What it is, for the command's help.
        write: Writes into an empty folder; raises ValueError where it can't hold the run.
        verify: Loads that folder, and returns how far its logits differ from the run's.
    """

    holds: str
    write: Callable[[Source, Path], None]
    verify: Callable[[Path, Probe], float]


FORMATS: dict[str, Format] = {
    "hf": Format("any method; transformers' Auto classes, code in the folder", hf.write, hf.verify),
    "hf-llava": Format(
        "plain encoders; transformers' LlavaForConditionalGeneration",
        hf_llava.write,
        hf_llava.verify,
    ),
    "llava": Format(
        "plain CLIP; LLaVA-1.5's own code",
        public.write_llava,
        partial(public.verify, layout="llava"),
    ),
    "covft": Format(
        "CLIP tuned by CoVFT, LoRA or VPT, or plain; CoVFT's public code",
        public.write_covft,
        partial(public.verify, layout="covft"),
    ),
    "internvl2": Format(
        "plain InternViT; InternVL2's own code",
        public.write_internvl2,
        partial(public.verify, layout="internvl2"),
    ),
}


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    to: str,
    dtype: str | None = None,
    device: str | None = None,
) -> float:
    """Export a finished run, and compare the result with it on an image and a question.

    Args:
        run: The run's folder.
        out: A folder that doesn't exist; it appears when it is complete and compared.
        to: One of :data:`FORMATS`.
        dtype: One of :data:`DTYPES` to convert the weights to; None leaves them as trained.
        device: Where the run's own logits are computed; the comparison is on the CPU.

    Returns:
        The largest difference of a logit in float32, relative to the largest one: what is left of
        sums in another order, and with ``dtype`` what rounding the weights does.

    Raises:
        FileNotFoundError: If there is no finished run.
        ValueError: If an option is unknown, the format can't hold the run, ``out`` exists, or the
            exported model doesn't give the run's logits, or in ``dtype`` no numbers; it is then
            kept under another name.
    """
    if to not in FORMATS:
        raise ValueError(f"--to {to}: no such format; {nearest(to, FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    with new_folder(Path(out)) as folder:
        source = Source(load_run(run, device=device))
        home = source.model.device
        source.model.cpu()
        kind = FORMATS[to]
        kind.write(source, folder)
        source.model.to(home)
        probe = Probe.of(source.run)
        del source  # two models of this size may be more than fits
        error = _verified(kind, folder, probe)
        if error > TOLERANCE:
            raise UnverifiedExportError(
                f"--to {to}: the exported model doesn't give the run's logits: they differ by "
                f"{error:.2g} of the largest, {TOLERANCE:g} is allowed."
            )
        if dtype is not None:  # only now: rounding moves logits by 1 % to 20 %, and hides mistakes
            convert_weights(folder, getattr(torch, dtype))
            error = _verified(kind, folder, probe)
        return error


def _verified(kind: Format, folder: Path, probe: Probe) -> float:
    try:
        return kind.verify(folder, probe)
    except UnverifiedExportError:
        raise
    except Exception as error:  # whatever other code's loaders raise
        raise UnverifiedExportError(f"the exported folder can't be loaded: {error}.") from error
