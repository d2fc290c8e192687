"""A tiny real MLLM with CoVFT, trained by one process or by several under any strategy.

As a script: ``python parallel_case.py FOLDER DTYPE NAME...`` trains, in one process, FOLDER/one,
and in two processes (gloo) for every NAME of a strategy

* FOLDER/NAME/whole: 12 steps;
* FOLDER/NAME/cut: the same, stopped after step 8 without saving (as a kill between two steps), then
  resumed from the checkpoint after step 6.

Each folder gets ``scalars.jsonl`` and ``weights.safetensors``. :func:`run_cases` calls the script
from a test; :func:`assert_like_one_process` and :func:`assert_resumed_bitwise` compare. The steps
hold 8 samples each: images, text alone, several images, an unsupervised sample, and an unusable
one, so that ranks meet micro-batches without images, tokens or samples at different times.
``train_case`` is what one process does, for other uses inside a :class:`forks.ForkedGroup`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401  (imported before the forks, which then needn't)
import torch
from forks import ForkedGroup, run_script
from miniature import ARCH
from mmengine.hooks import Hook
from safetensors.torch import load_file
from torch import distributed
from torch.utils.data import DataLoader, Dataset

import covft.vft  # noqa: F401
from covft.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID
from covft.datasets.sampler import StepBatchSampler
from covft.engine import Runner
from covft.engine.scalars_hook import read_scalars
from covft.models import MLLM
from covft.registry import MODELS

WORLD_SIZE = 2
STEP_SIZE = 8
MAX_ITERS = 12
CUT_AFTER, EVERY = 8, 6
VOCABULARY = 60
#: Parts of the names of what the clock and the machine decide.
CLOCKED = ("second", "memory", "flops", "mfu", "share")
MODEL = {
    "type": "MLLM",
    "vision": {
        "backbone": {"type": "CLIP", "arch": ARCH},
        "vft": {"type": "CoVFT", "num_experts": 2, "first_block": 1},
    },
    "projector": {"type": "MLPProjector"},
    "llm": {
        "type": "CausalLM",
        "arch": {
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    },
    "text_encoder": {
        "type": "TextEncoder",
        "arch": {
            "model_type": "bert",
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    },
}
OPTIM_WRAPPER = {
    # A large eps: where a gradient is zero but for rounding, Adam would magnify that.
    "optimizer": {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.1, "eps": 1e-4},
    "lr": {"vision": 3e-3, "projector": 2e-3},
    "clip_grad": {"max_norm": 0.5},
    "precision": "fp32",
}


class Samples(Dataset[dict[str, Any]]):
    """24 samples, fixed by their index: of 8, one each is odd in the ways listed above."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        kind = index % 8
        num_images = {1: 0, 3: 0, 4: 2}.get(kind, 1)
        text = torch.randint(1, VOCABULARY, (6 + index % 5,), generator=generator)
        images = torch.full((16 * num_images,), IMAGE_TOKEN_ID)
        ids = torch.cat([text[:2], images, text[2:]])
        labels = ids.clone()
        labels[: len(ids) - (0 if kind == 6 else 3)] = IGNORE_INDEX
        if kind == 6:
            labels[:] = IGNORE_INDEX
        return {
            "id": f"s{index}",
            "usable": kind != 7,
            "input_ids": ids,
            "labels": labels,
            "pixels": torch.randint(
                0, 256, (num_images, 3, 32, 32), dtype=torch.uint8, generator=generator
            ),
            "context": torch.randint(1, VOCABULARY, (4,), generator=generator),
        }


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Make a micro-batch of one sample; without a usable one, of one unsupervised token."""
    (sample,) = samples
    if not sample["usable"]:
        token = torch.zeros(1, dtype=torch.long)
        nothing = {"input_ids": token, "labels": token + IGNORE_INDEX, "context": token}
        sample = {**sample, **nothing, "pixels": sample["pixels"][:0]}
    images = len(sample["pixels"])
    return {
        "input_ids": sample["input_ids"][None],
        "labels": sample["labels"][None],
        "attention_mask": torch.ones(1, len(sample["input_ids"]), dtype=torch.bool),
        "pixel_values": sample["pixels"],
        "image_to_sample": torch.zeros(images, dtype=torch.long),
        "context_ids": sample["context"][None],
        "context_mask": torch.ones(1, len(sample["context"]), dtype=torch.bool),
        "sample_ids": [sample["id"]],
        "bad_samples": [],
    }


class StopAfter(Hook):
    """Ends a run like a kill between two steps: nothing is saved at the end."""

    def __init__(self, step: int) -> None:
        self.step = step

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if batch_idx + 1 == self.step:
            raise KeyboardInterrupt


class ModuleNorms(Hook):
    """Keeps every step's gradient norms per module in ``module_norms.jsonl``."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        norms = runner.optim_wrapper.module_norms()
        if runner.rank == 0:
            with (Path(runner.work_dir) / "module_norms.jsonl").open("a") as file:
                file.write(json.dumps(norms) + "\n")


def build_model(dtype: str = "float32", **vision: Any) -> MLLM:
    """Build the model with every parameter drawn at random, the same in all processes."""
    torch.manual_seed(0)
    model = MODELS.build({**MODEL, "vision": {**MODEL["vision"], **vision}})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.to(getattr(torch, dtype))


def build_runner(
    work_dir: Path,
    *,
    strategy: dict[str, Any] | None = None,
    rank: int = 0,
    world_size: int = 1,
    dtype: str = "float32",
    model: MLLM | None = None,
    checkpoint: dict[str, Any] | None = None,
    hooks: list[Any] | None = None,
    **parts: Any,
) -> Runner:
    """Build this process's runner of the case; ``parts`` go to ``Runner.from_parts``."""
    accumulation = STEP_SIZE // world_size
    samples = Samples()
    sampler = StepBatchSampler(
        [1] * len(samples),
        batch_size=1,
        accumulation=accumulation,
        rank=rank,
        world_size=world_size,
    )
    saving = {"type": "CheckpointHook", "interval": EVERY, "max_keep": 4, **(checkpoint or {})}
    options = {
        "optim_wrapper": OPTIM_WRAPPER,
        "train_cfg": {"max_iters": MAX_ITERS, "accumulation": accumulation},
        "param_scheduler": {"type": "CosineWarmup", "warmup_iters": 2},
        "launcher": "none" if world_size == 1 and strategy is None else "pytorch",
        **parts,
    }
    return Runner.from_parts(
        model=build_model(dtype) if model is None else model,
        dataloader=DataLoader(samples, batch_sampler=sampler, collate_fn=collate),
        work_dir=work_dir,
        strategy=strategy,
        hooks=[saving, ModuleNorms(), *(hooks or [])],
        **options,
    )


def train_case(work_dir: Path, *, stop_after: int | None = None, **parts: Any) -> None:
    """Train the case to its end, or leave it after a step; see :func:`build_runner`."""
    hooks = [*parts.pop("hooks", []), *([] if stop_after is None else [StopAfter(stop_after)])]
    try:
        build_runner(work_dir, hooks=hooks, **parts).train()
    except KeyboardInterrupt:
        if distributed.is_initialized():
            distributed.barrier()


def train_cut_and_whole(folder: Path, **parts: Any) -> None:
    """Train ``folder/whole`` without a break and ``folder/cut`` with one."""
    train_case(folder / "whole", **parts)
    train_case(folder / "cut", stop_after=CUT_AFTER, **parts)
    train_case(folder / "cut", resume=True, **parts)


def run_cases(folder: Path, *names: str, dtype: str = "float32") -> None:
    """Run this file as a script, see above."""
    run_script(Path(__file__), folder, dtype, *names)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the final weights of a run."""
    return load_file(folder / "weights.safetensors")


def assert_like_one_process(folder: Path, one: Path, *, rel: float) -> None:
    """Compare every step's loss, norm and rates, and the final weights, with one process's."""
    logs = [read_scalars(path / "scalars.jsonl") for path in (folder, one)]
    assert len(logs[0]) == len(logs[1]) == MAX_ITERS
    for ours, theirs in zip(*logs, strict=True):
        assert ours["tokens"] == theirs["tokens"] > 0
        assert {k: v for k, v in ours.items() if k[:2] == "lr"} == {
            k: v for k, v in theirs.items() if k[:2] == "lr"
        }
        for name in ("loss", "grad_norm"):
            assert abs(ours[name] / theirs[name] - 1) <= rel, (ours["step"], name, ours, theirs)
    for ours, theirs in zip(*(_norms(path) for path in (folder, one)), strict=True):
        assert ours.keys() == theirs.keys() == {"vision", "projector", "llm"}
        assert all(abs(ours[name] / theirs[name] - 1) <= rel for name in ours), (ours, theirs)
    ours, theirs = weights_of(folder), weights_of(one)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        scale = float(value.abs().max())
        assert float((ours[name] - value).abs().max()) <= rel * max(scale, 0.1), name


def assert_resumed_bitwise(folder: Path) -> None:
    """Compare ``folder/cut`` with ``folder/whole``, bit for bit."""
    assert "resuming from" in (folder / "cut/train.log").read_text()
    logs = [read_scalars(folder / name / "scalars.jsonl") for name in ("cut", "whole")]
    for ours, theirs in zip(*logs, strict=True):
        same = [key for key in ours if not any(part in key for part in CLOCKED)]
        assert {"step", "loss", "grad_norm", "tokens"} <= set(same)
        assert ours.keys() == theirs.keys()
        assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    ours, theirs = weights_of(folder / "cut"), weights_of(folder / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def _norms(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "module_norms.jsonl").read_text().splitlines()]


def main(folder: Path, dtype: str, *names: str) -> None:
    """Run the cases, see above."""
    torch.set_num_threads(1)

    def task(rank: int) -> None:
        for name in names:
            parts = {"rank": rank, "world_size": WORLD_SIZE, "dtype": dtype}
            started = time.perf_counter()
            train_cut_and_whole(folder / name, strategy={"type": name}, **parts)
            if rank == 0:
                print(f"{name}: {time.perf_counter() - started:.1f} s")

    ForkedGroup(WORLD_SIZE).run(task)
    train_case(folder / "one", dtype=dtype)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
