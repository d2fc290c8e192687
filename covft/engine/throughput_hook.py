"""How fast a run is, and how much of the hardware it uses, beside every step's loss."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.hooks import Hook

from covft.checkpoints.trainable import unwrapped
from covft.engine.flops import FlopModel, Work, peak_tflops
from covft.registry import HOOKS

if TYPE_CHECKING:
    from covft.engine.runner import Runner


@HOOKS.register_module()
class ThroughputHook(Hook):
    """Adds a step's throughput to what is logged of it.

    Over all processes: ``input_tokens`` (those of the LLM's input, visual ones included, padding
    not; the loop's ``tokens`` are the supervised ones), ``samples`` and ``images`` (a tile counts
    as one), and each of the three ``_per_second``. Of a process's device: ``tflops_per_device``
    (TFLOP/s, counted by :class:`~covft.engine.flops.FlopModel`; left out for a model that can't be
    counted; 0 for a step without a supervised token, which computes nothing), ``mfu`` (their
    share of the peak; left out where no peak is known). Of the main process: ``peak_memory_gib``
    (on CUDA the most that was allocated since the run's start, else the process's largest resident
    set) and ``data_share`` (time waited for data). Before clipping:
    ``grad_norm/<part>`` of each part of the model.

    Args:
        peak_tflops: What a device can do at most, TFLOP/s; by default its data sheet's value for
            dense bf16 products, if it is a GPU that :mod:`covft.engine.flops.peak` lists.

    Raises:
        ValueError: If ``peak_tflops`` isn't positive.
    """

    # Before the hooks that write what it adds.
    priority = "HIGH"

    def __init__(self, *, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and peak_tflops <= 0:
            raise ValueError(
                f"logging.peak_tflops is what a device can do at most, in TFLOP/s; got "
                f"{peak_tflops}: leave it out where it isn't known"
            )
        self.peak_tflops = peak_tflops
        self._flops: FlopModel | None = None

    def before_train(self, runner: Runner) -> None:
        """Count what the model computes for a token and for an image."""
        if self.peak_tflops is None and torch.cuda.is_available():
            self.peak_tflops = peak_tflops(torch.cuda.get_device_name())
        model: Any = unwrapped(runner.model)
        try:
            self._flops = FlopModel(model)
        except ValueError as error:
            # An LLM or a method of the user's own: a run must not fail for want of a figure.
            runner.logger.info(f"TFLOP/s aren't logged: {error}")

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Add the step's figures to ``outputs``."""
        totals = self._totals(data_batch)
        seconds = outputs["seconds"]
        for name in ("input_tokens", "samples", "images"):
            outputs[name] = int(totals[name])
            outputs[f"{name}_per_second"] = totals[name] / seconds
        if self._flops is not None:
            # Without a supervised token there was neither forward nor backward. A figure all the
            # same: the log's means are over steps that may be of both kinds.
            flops = totals["flops"] if outputs["tokens"] else 0.0
            tflops = flops / get_world_size() / seconds / 1e12
            outputs["tflops_per_device"] = tflops
            if self.peak_tflops is not None:
                outputs["mfu"] = tflops / self.peak_tflops
        memory = peak_memory_bytes()
        if memory is not None:
            outputs["peak_memory_gib"] = memory / 2**30
        outputs["data_share"] = outputs["data_seconds"] / seconds
        if outputs["tokens"]:
            for part, norm in runner.optim_wrapper.module_norms().items():
                outputs[f"grad_norm/{part}"] = norm

    def _totals(self, batches: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Return the sums over a step's micro-batches and all processes."""
        works = [Work.of(batch) for batch in batches]
        own = {
            "input_tokens": sum(sum(work.lengths) for work in works),
            "samples": sum(len(batch["sample_ids"]) for batch in batches),
            "images": sum(len(work.image_texts) for work in works),
            "flops": sum(self._flops.of(work).total for work in works) if self._flops else 0,
        }
        summed = torch.tensor(list(own.values()), dtype=torch.float64)
        all_reduce(summed)
        return dict(zip(own, summed.tolist(), strict=True))


def peak_memory_bytes() -> int | None:
    """Return the most memory that this process has used: on its GPU if there is one, else at all.

    Returns:
        Bytes; None where the system doesn't tell.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource

    # Kilobytes, but on macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
