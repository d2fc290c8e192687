"""Every step's numbers in ``scalars.jsonl``, and a picture of the loss."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mmengine.dist import master_only
from mmengine.hooks import Hook

from covft.atomic import atomic_write, atomic_write_text
from covft.registry import HOOKS

if TYPE_CHECKING:
    from covft.engine.runner import Runner

SCALARS_NAME = "scalars.jsonl"
LOSS_CURVE_NAME = "loss_curve.png"


def read_scalars(path: Path) -> list[dict[str, Any]]:
    """Return the records of a ``scalars.jsonl``; a torn last line is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


@HOOKS.register_module()
class ScalarsHook(Hook):
    """Appends a line per step to ``scalars.jsonl``; passes the numbers to the visualizer.

    A line holds ``step`` (from 1), ``loss`` (nats per supervised token), ``lr`` (or one per group
    as ``lr/<name>``), ``grad_norm`` (before clipping), ``tokens`` (supervised, all processes),
    ``seconds``, ``data_seconds``, what :class:`~covft.engine.ThroughputHook` adds, and why a step
    was ``skipped``; numbers that aren't finite are null. A resumed run removes the lines after the
    step it continues from, so that no step is there twice.
    """

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    @master_only
    def before_train(self, runner: Runner) -> None:
        """Open the file, cut to the steps that this run doesn't repeat."""
        path = Path(runner.work_dir) / SCALARS_NAME
        done = read_scalars(path) if runner.iter and path.exists() else []
        kept = [json.dumps(record) for record in done if record["step"] <= runner.iter]
        atomic_write_text(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    @master_only
    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Write the step's line, at once: what a kill leaves is complete up to the last step."""
        assert self._file is not None
        step = batch_idx + 1
        record = {"step": step, **{name: _finite(value) for name, value in outputs.items()}}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if runner.visualizer is not None:
            numbers = {k: v for k, v in record.items() if isinstance(v, float) and k != "step"}
            runner.visualizer.add_scalars({f"train/{k}": v for k, v in numbers.items()}, step=step)

    @master_only
    def after_train(self, runner: Runner) -> None:
        """Draw the loss curve."""
        records = read_scalars(Path(runner.work_dir) / SCALARS_NAME)
        losses = {r["step"]: r["loss"] for r in records if r["loss"] is not None}
        if losses:
            draw_loss_curve(losses, Path(runner.work_dir) / LOSS_CURVE_NAME)

    def on_exit(self, runner: Runner) -> None:
        """Close the file and the visualizer's backends."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if runner.visualizer is not None:
            runner.visualizer.close()


def draw_loss_curve(losses: Mapping[int, float], path: Path) -> None:
    """Draw the loss over the steps, raw and smoothed, as a PNG."""
    # Drawn without pyplot: no global figure, no display, whatever backend a notebook has chosen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss (nats per token)")
    steps, values = list(losses), list(losses.values())
    axes.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1, label="loss")
    axes.plot(steps, _smoothed(values), color="tab:blue", label="smoothed")
    axes.grid(alpha=0.3)
    axes.legend()
    atomic_write(path, lambda partial: figure.savefig(partial, format="png", dpi=120))


def _smoothed(values: list[float]) -> list[float]:
    """Return an exponential moving average over a twentieth of the run, free of start-up bias."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total = keep * total + value
        weight = keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
