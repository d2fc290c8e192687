"""The training loop: one iteration is one optimizer step, however many micro-batches it takes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.runner import BaseLoop
from torch import Tensor
from torch.utils.data import DataLoader

from covft.conversation import IGNORE_INDEX
from covft.engine.random_state import restore_random_state
from covft.registry import LOOPS

if TYPE_CHECKING:
    from covft.engine.runner import Runner

Batch = dict[str, Any]


@LOOPS.register_module()
class TrainLoop(BaseLoop):
    """Runs optimizer steps whose loss is the mean over all supervised tokens of the step.

    The tokens are counted over the micro-batches of a step and over all processes before the first
    backward, so that every token weighs the same: accumulating 8 micro-batches of 1 gives the
    gradient of one batch of 8. Steps that can't be used leave weights and optimizer as they are,
    but count: the schedule and the data go on.

    Args:
        runner: The runner.
        dataloader: Yields micro-batches without end, from a step-wise batch sampler.
        max_iters: Number of optimizer steps.
        max_epochs: Length in passes over the data instead.
        accumulation: Micro-batches per optimizer step and process.
        max_bad_steps: So many non-finite losses or gradients in a row end the run.

    Attributes:
        stop_training: Set to True by a hook to end the run after the current step.
        skipped_steps: Steps so far without a supervised token.
        bad_steps: Steps so far with a non-finite loss or gradient.

    Raises:
        ValueError: If the length isn't given exactly once, or the sampler counts other steps.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader[Any],
        *,
        max_iters: int | None = None,
        max_epochs: float | None = None,
        accumulation: int = 1,
        max_bad_steps: int = 10,
    ) -> None:
        super().__init__(runner, dataloader)
        sampler: Any = dataloader.batch_sampler
        if sampler.accumulation != accumulation:
            raise ValueError(
                f"the sampler makes steps of {sampler.accumulation} micro-batches, but "
                f"train_cfg.accumulation is {accumulation}"
            )
        self.max_iters = _run_length(max_iters, max_epochs, sampler.steps_per_epoch)
        self._sampler = sampler
        self.accumulation = accumulation
        self.max_bad_steps = max_bad_steps
        self.stop_training = False
        self.skipped_steps = 0
        self.bad_steps = 0
        self._bad_in_a_row = 0
        self._iter = 0
        self._random_state: Mapping[str, Any] | None = None

    @property
    def iter(self) -> int:
        """Number of finished steps; the index of the current one while it runs."""
        return self._iter

    @property
    def epoch(self) -> int:
        """Number of whole passes over the data so far."""
        return int(self._iter // self._sampler.steps_per_epoch)

    @property
    def max_epochs(self) -> int:
        """Passes over the data in the whole run, the last of which may be partial."""
        return math.ceil(self.max_iters / self._sampler.steps_per_epoch)

    def state_dict(self) -> dict[str, int]:
        """Return the counters that a resumed run needs."""
        return {
            "skipped_steps": self.skipped_steps,
            "bad_steps": self.bad_steps,
            "bad_in_a_row": self._bad_in_a_row,
        }

    def resume(
        self, iteration: int, state: Mapping[str, int], random_state: Mapping[str, Any] | None
    ) -> None:
        """Continue after ``iteration`` finished steps.

        Args:
            iteration: Number of finished steps.
            state: What :meth:`state_dict` returned then.
            random_state: The generators' state then; None leaves them as they are.
        """
        self._iter = iteration
        self.skipped_steps = state["skipped_steps"]
        self.bad_steps = state["bad_steps"]
        self._bad_in_a_row = state["bad_in_a_row"]
        self._random_state = random_state

    def run(self) -> torch.nn.Module:
        """Train to the end of the run; return the model."""
        runner = self.runner
        runner.model.train()
        runner.call_hook("before_train")
        runner.call_hook("before_train_epoch")
        if self._iter < self.max_iters:
            self._run_steps()
        runner.call_hook("after_train_epoch")
        runner.call_hook("after_train")
        return runner.model

    def _run_steps(self) -> None:
        self._sampler.start_step = self._iter
        micro_batches = iter(self.dataloader)
        if self._random_state is not None:
            # Only now: iter() has drawn a seed for the workers from torch's generator.
            restore_random_state(self._random_state)
        while self._iter < self.max_iters and not self.stop_training:
            self._run_step(micro_batches)

    def _run_step(self, micro_batches: Iterator[Batch]) -> None:
        started = time.perf_counter()
        batches = [next(micro_batches) for _ in range(self.accumulation)]
        data_seconds = time.perf_counter() - started
        self.runner.call_hook("before_train_iter", batch_idx=self._iter, data_batch=batches)
        started = time.perf_counter()
        outputs = self._update(batches)
        seconds = data_seconds + time.perf_counter() - started
        outputs["seconds"] = seconds
        outputs["data_seconds"] = data_seconds
        self._publish(outputs)
        self.runner.call_hook(
            "after_train_iter", batch_idx=self._iter, data_batch=batches, outputs=outputs
        )
        self._iter += 1

    def _update(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Do one optimizer step; return what is worth logging."""
        outputs: dict[str, Any] = {"tokens": 0, **self._learning_rates()}
        counts = [num_supervised(batch) for batch in batches]
        tokens = _sum_over_ranks(sum(counts))
        if not tokens:
            return {**outputs, **self._skip(batches)}
        outputs["tokens"] = tokens
        outputs["loss"], auxiliary = self._backward(batches, counts, tokens).tolist()
        if auxiliary:
            outputs["auxiliary_loss"] = auxiliary
        outputs["grad_norm"] = float(self.runner.optim_wrapper.clip_gradients())
        if math.isfinite(outputs["loss"]) and math.isfinite(outputs["grad_norm"]):
            self.runner.optim_wrapper.step()
            self._bad_in_a_row = 0
        else:
            outputs["skipped"] = "non-finite loss or gradient"
            self._count_bad_step(outputs, batches)
        self.runner.optim_wrapper.zero_grad()
        return outputs

    def _backward(self, batches: Sequence[Batch], counts: Sequence[int], tokens: int) -> Tensor:
        """Add up the gradients of the token mean.

        Micro-batches without a supervised token are run like the others: a process that left its
        own out would leave the others waiting for its part of parameters and gradients.

        Returns:
            The means over all processes of the loss and of what the method adds to it, (2,).
        """
        model, optim_wrapper = self.runner.model, self.runner.optim_wrapper
        device = self.runner.strategy.device
        sums = []
        for index, (batch, count) in enumerate(zip(batches, counts, strict=True)):
            with optim_wrapper.micro_batch(model, last=index == len(batches) - 1):
                output = model(**_model_inputs(batch, device))
                assert int(output.num_tokens) == count, (
                    f"the model supervised {int(output.num_tokens)} tokens, the labels hold {count}"
                )
                # Processes' gradients are averaged, but what is wanted is their sum.
                loss = _objective(output) * (get_world_size() / tokens)
                # Autocast is for the forward: it would round what a backward of ours computes in
                # float32. Recomputed layers bring their own.
                with torch.autocast(device.type, enabled=False):
                    optim_wrapper.backward(loss)
            sums.append(torch.stack([output.loss_sum.detach(), _auxiliary_sum(output).detach()]))
        totals = torch.stack(sums).double().sum(0)
        all_reduce(totals)
        return totals / tokens

    def _skip(self, batches: Sequence[Batch]) -> dict[str, Any]:
        self.skipped_steps += 1
        self.runner.logger.warning(
            f"step {self._iter + 1}: no supervised token, so no update ({_sample_names(batches)}); "
            f"{self.skipped_steps} such steps so far. Check max_length and the answers in the data."
        )
        return {"loss": math.nan, "grad_norm": math.nan, "skipped": "no supervised token"}

    def _count_bad_step(self, outputs: Mapping[str, Any], batches: Sequence[Batch]) -> None:
        self.bad_steps += 1
        self._bad_in_a_row += 1
        message = (
            f"step {self._iter + 1}: loss {outputs['loss']}, gradient norm {outputs['grad_norm']}, "
            f"so no update ({_sample_names(batches)}); {self._bad_in_a_row} in a row, "
            f"{self.bad_steps} in all"
        )
        self.runner.logger.warning(message)
        if self._bad_in_a_row >= self.max_bad_steps:
            raise RuntimeError(
                f"{message}. Lower optim_wrapper.optimizer.lr, clip gradients "
                "(optim_wrapper.clip_grad), use precision 'fp32', or raise train_cfg.max_bad_steps."
            )

    def _learning_rates(self) -> dict[str, float]:
        rates = self.runner.optim_wrapper.learning_rates()
        if len(rates) == 1:
            return {"lr": next(iter(rates.values()))}
        return {f"lr/{name}": value for name, value in rates.items()}

    def _publish(self, outputs: Mapping[str, Any]) -> None:
        """Tell mmengine's message hub, where hooks and modules of others look."""
        hub = self.runner.message_hub
        hub.update_info_dict({"iter": self._iter, "max_iters": self.max_iters})
        hub.update_scalars({f"train/{name}": outputs[name] for name in ("loss", "grad_norm")})


def _auxiliary_sum(output: Any) -> Tensor:
    """Return what a method adds to the loss, weighted like the micro-batch's tokens, a scalar."""
    if output.auxiliary is None:
        return output.loss_sum.new_zeros(())
    return output.auxiliary * output.num_tokens


def _objective(output: Any) -> Tensor:
    return output.loss_sum + _auxiliary_sum(output)


def num_supervised(batch: Batch) -> int:
    """Return how many positions of a micro-batch have a label to be predicted."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def _run_length(max_iters: int | None, max_epochs: float | None, steps_per_epoch: float) -> int:
    if max_iters is not None and max_epochs is None:
        length = max_iters
    elif max_epochs is not None and max_iters is None:
        length = math.ceil(max_epochs * steps_per_epoch)
    else:
        raise ValueError(
            "train_cfg must give either max_iters or max_epochs, "
            f"got max_iters={max_iters} and max_epochs={max_epochs}"
        )
    if length < 1:
        raise ValueError(f"train_cfg asks for {length} optimizer steps; at least 1 is needed")
    return length


def _sum_over_ranks(number: int) -> int:
    summed = torch.tensor(number, dtype=torch.int64)
    all_reduce(summed)
    return int(summed)


def _model_inputs(batch: Batch, device: torch.device) -> Batch:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name != "bad_samples"
    }


def _sample_names(batches: Sequence[Batch]) -> str:
    names = [str(name) for batch in batches for name in batch.get("sample_ids", ())]
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"samples {shown}" if names else "no samples"
