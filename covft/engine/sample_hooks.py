"""What the run reads and says: samples that can't be used, a decoded one, and generations."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mmengine.dist import all_reduce, get_rank, is_main_process
from mmengine.hooks import Hook
from torch import nn

from covft.atomic import atomic_write_text
from covft.checkpoints.trainable import unwrapped
from covft.engine.random_state import preserved_random_state
from covft.registry import HOOKS

if TYPE_CHECKING:
    from covft.engine.runner import Runner


@HOOKS.register_module()
class BadSampleHook(Hook):
    """Lists the samples that were left out, each once, in ``bad_samples.jsonl``.

    They come from ``batch["bad_samples"]`` (unreadable when it was their turn) and from the
    dataset's ``bad`` attribute (unusable from the start), objects with ``id`` and ``reason``.
    Processes other than the first write ``bad_samples.rank<N>.jsonl``.
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def before_train(self, runner: Runner) -> None:
        """Start the list, or go on with it when the run is resumed."""
        self._path = Path(runner.work_dir) / _bad_samples_name(get_rank())
        if not runner.iter:
            self._path.unlink(missing_ok=True)
        elif self._path.exists():
            self._seen = _mended_ids(self._path)
        if get_rank() == 0:
            self._add(runner, getattr(runner.train_dataloader.dataset, "bad", ()))

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Sequence[dict[str, Any]] = ()
    ) -> None:
        """Add the samples that this step had to leave out."""
        for batch in data_batch:
            self._add(runner, batch.get("bad_samples", ()))

    def after_train(self, runner: Runner) -> None:
        """Say how many there were."""
        # Every sample belongs to one process of an epoch, but not to the same in each: the sum
        # over several epochs is an upper bound.
        total = torch.tensor(len(self._seen))
        all_reduce(total)
        if total:
            runner.logger.warning(
                f"{int(total)} samples were left out of the training; they are listed in "
                f"{Path(runner.work_dir) / _bad_samples_name(0)}"
            )

    def _add(self, runner: Runner, samples: Iterable[Any]) -> None:
        new = [sample for sample in samples if str(sample.id) not in self._seen]
        if not new:
            return
        with self._path.open("a", encoding="utf-8") as file:
            for sample in new:
                self._seen.add(str(sample.id))
                file.write(json.dumps({"id": sample.id, "reason": sample.reason}) + "\n")
        runner.logger.warning(
            f"{len(new)} unusable samples left out, {len(self._seen)} so far; "
            f"sample '{new[0].id}': {new[0].reason}"
        )


@HOOKS.register_module()
class SampleLogHook(Hook):
    """Logs a decoded training sample at the start, and what the model generates now and then.

    Args:
        preview: Called with the model in eval mode; returns the texts to log, such as a question,
            the expected answer and the model's. None logs no generations.
        interval: Optimizer steps between generations; None generates at the start only.
        sample_index: Which sample of the dataset is shown, by its ``describe(index)``; datasets
            without such a method show none.

    Raises:
        ValueError: If ``interval`` is given without ``preview``, or below 1.
    """

    def __init__(
        self,
        *,
        preview: Callable[[nn.Module], list[str]] | None = None,
        interval: int | None = None,
        sample_index: int = 0,
    ) -> None:
        if interval is not None and (preview is None or interval < 1):
            raise ValueError(
                "SampleLogHook: interval must be at least 1 and needs a preview to call, "
                f"got interval={interval} and preview={preview}"
            )
        self.preview = preview
        self.interval = interval
        self.sample_index = sample_index

    def before_train(self, runner: Runner) -> None:
        """Show the sample and the generations before the first step."""
        dataset = runner.train_dataloader.dataset
        if hasattr(dataset, "describe") and is_main_process():
            text = dataset.describe(self.sample_index)
            runner.logger.info(f"training sample {self.sample_index}:\n{_indented(text)}")
        self._log_generations(runner, runner.iter)

    def after_train_iter(self, runner: Runner, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        """Show the generations if it is time."""
        if self.interval is not None and (batch_idx + 1) % self.interval == 0:
            self._log_generations(runner, batch_idx + 1)

    def _log_generations(self, runner: Runner, step: int) -> None:
        if self.preview is None:
            return
        model = unwrapped(runner.model)
        modes = {module: module.training for module in model.modules()}
        model.eval()
        # Looking must not change the training: neither its dropout nor what is frozen in eval mode.
        # All processes look: where each holds a shard, none can alone.
        with preserved_random_state(), torch.no_grad(), runner.strategy.autocast():
            texts = self.preview(model)
        for module, training in modes.items():
            module.training = training
        shown = "\n".join(_indented(text) for text in texts)
        runner.logger.info(f"generations after {step} steps:\n{shown}")


def _bad_samples_name(rank: int) -> str:
    return "bad_samples.jsonl" if rank == 0 else f"bad_samples.rank{rank}.jsonl"


def _mended_ids(path: Path) -> set[str]:
    """Return the ids in a list, and rewrite it without what a kill has torn.

    The next line would be written behind a torn one. Its sample is listed again.
    """
    ids, lines = set(), []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            ids.add(str(json.loads(line)["id"]))
        except json.JSONDecodeError:
            continue
        lines.append(line + "\n")
    atomic_write_text(path, "".join(lines))
    return ids


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
