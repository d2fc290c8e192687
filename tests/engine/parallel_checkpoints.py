"""What two processes do with checkpoints and bad steps; run by test_parallel_checkpoints.py."""

from __future__ import annotations

import json
import math
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from forks import ForkedGroup
from parallel_case import WORLD_SIZE, Samples, build_model, collate, train_case
from torch import Tensor, distributed

from covft.engine import AutocastOptimWrapper, SampleLogHook
from covft.registry import OPTIM_WRAPPERS

FSDP2, DDP = {"type": "fsdp2"}, {"type": "ddp"}
WHOLE = {"sharded": False}


@OPTIM_WRAPPERS.register_module()
class OneRankExplodes(AutocastOptimWrapper):
    """In the second step, the second process's loss isn't finite."""

    backwards = 0

    def backward(self, loss: Tensor) -> None:
        self.backwards += 1
        explodes = distributed.get_rank() == 1 and self.backwards == 6
        super().backward(loss * math.nan if explodes else loss)


def answer(model: torch.nn.Module) -> list[str]:
    """Return what the model generates for a sample, as text."""
    batch = collate([Samples()[0]])
    for name in ("labels", "bad_samples"):
        del batch[name]
    return [str(model.generate(**batch, max_new_tokens=5))]


def train(folder: Path, rank: int, *, steps: int = 4, **parts) -> None:
    accumulation = 8 // WORLD_SIZE
    options = {"train_cfg": {"max_iters": steps, "accumulation": accumulation}, "rank": rank}
    options["checkpoint"] = {"interval": 2, **parts.pop("checkpoint", {})}
    train_case(folder, world_size=WORLD_SIZE, dtype="float64", **{**options, **parts})


def refused(folder: Path, name: str, rank: int, **parts) -> None:
    """Write down with which message a run is refused."""
    try:
        train(folder / name, rank, **parts)
    except ValueError as error:
        if rank == 0:
            (folder / f"{name}.txt").write_text(str(error))
    distributed.barrier()


def work(folder: Path, rank: int) -> None:
    preview = SampleLogHook(preview=answer)
    train(folder / "shards", rank, strategy=FSDP2, hooks=[preview])
    train(folder / "fsdp2", rank, strategy=FSDP2, checkpoint=WHOLE)
    train(folder / "ddp", rank, strategy=DDP)
    from_fsdp2, from_ddp = folder / "fsdp2/iter_2.pth", folder / "ddp/iter_2.pth"
    train(folder / "fsdp2_to_ddp", rank, strategy=DDP, resume=from_fsdp2)
    train(folder / "ddp_to_fsdp2", rank, strategy=FSDP2, resume=from_ddp)
    refused(folder, "shards_to_ddp", rank, strategy=DDP, resume=folder / "shards/iter_2")
    refused(folder, "sharded_ddp", rank, strategy=DDP, checkpoint={"sharded": True})
    for name, strategy in (("ddp", DDP), ("fsdp2", FSDP2)):
        explodes = {"optimizer": {"type": "SGD", "lr": 0.01}, "type": "OneRankExplodes"}
        train(folder / f"bad_{name}", rank, strategy=strategy, steps=3, optim_wrapper=explodes)


def alone(folder: Path) -> None:
    """Go on with the two processes' shards in one."""
    steps = {"max_iters": 4, "accumulation": 8}
    resume = folder / "shards/iter_2"
    train_case(folder / "one", strategy=FSDP2, dtype="float64", resume=resume, train_cfg=steps)


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    ForkedGroup(WORLD_SIZE).run(lambda rank: work(folder, rank))
    ForkedGroup(1).run(lambda rank: alone(folder))
    steps = {"max_iters": 4, "accumulation": 8}
    resume = folder / "ddp/iter_2.pth"
    train_case(folder / "single", dtype="float64", resume=resume, train_cfg=steps)
    with torch.no_grad():
        texts = answer(build_model("float64").eval())
    (folder / "answer.json").write_text(json.dumps(texts))


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        main(Path(sys.argv[1]))
