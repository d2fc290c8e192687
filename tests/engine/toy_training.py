"""A model, a dataset and a sampler with the contracts of the real ones, but tiny."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from covft.engine import Runner
from covft.engine.scalars_hook import read_scalars

IGNORE = -100
VOCABULARY = 17
#: What two runs must agree in; seconds and speeds differ.
EXACT = ("step", "loss", "lr", "grad_norm", "tokens")


@dataclass
class Loss:
    loss_sum: Tensor
    num_tokens: int
    auxiliary: Tensor | None = None


@dataclass
class Unusable:
    id: str
    reason: str


class ToyModel(nn.Module):
    """Predicts the next token from the one before; its embedding is frozen."""

    def __init__(self, *, dim: int = 8, dropout: float = 0.3, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(VOCABULARY, dim).requires_grad_(False)
            self.vision = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
            self.projector = nn.Linear(dim, dim)
            self.dropout = nn.Dropout(dropout)
            self.llm = nn.Linear(dim, VOCABULARY)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(
        self, *, input_ids: Tensor, labels: Tensor, attention_mask: Tensor, sample_ids: list[str]
    ) -> Loss:
        self.calls += 1
        states = self.projector(self.vision(self.embed(input_ids)))
        logits = self.llm(self.dropout(F.gelu(states)))[:, :-1]
        targets = labels[:, 1:]
        keep = targets != IGNORE
        loss = F.cross_entropy(logits[keep], targets[keep], reduction="sum")
        return Loss(loss, int(keep.sum()))


class ToyDataset(Dataset[dict[str, Any]]):
    """Samples of different lengths and numbers of supervised tokens, fixed by their index."""

    def __init__(self, size: int = 40, bad: tuple[int, ...] = ()) -> None:
        self.size = size
        self.bad_indices = bad

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any] | Unusable:
        if index in self.bad_indices:
            return Unusable(f"s{index}", "truncated image")
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(VOCABULARY, (3 + index % 5,), generator=generator)
        labels = ids.clone()
        labels[: 1 + index % 3] = IGNORE
        return {"id": f"s{index}", "input_ids": ids, "labels": labels}

    def describe(self, index: int) -> str:
        return f"question {index} [[answer {index}]]"


def collate(samples: list[Any]) -> dict[str, Any]:
    good = [sample for sample in samples if not isinstance(sample, Unusable)]
    length = max((len(sample["input_ids"]) for sample in good), default=0)

    def padded(key: str, value: int) -> Tensor:
        rows = [F.pad(s[key], (0, length - len(s[key])), value=value) for s in good]
        return torch.stack(rows) if rows else torch.zeros((0, 0), dtype=torch.int64)

    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", IGNORE),
        "attention_mask": padded("labels", IGNORE) != IGNORE,
        "sample_ids": [sample["id"] for sample in good],
        "bad_samples": [sample for sample in samples if isinstance(sample, Unusable)],
    }


class ToySampler:
    """Micro-batches without end; step s holds the same samples however it is split."""

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.rank = rank
        self.world_size = world_size
        self.start_step = 0

    @property
    def step_size(self) -> int:
        return self.batch_size * self.accumulation * self.world_size

    @property
    def steps_per_epoch(self) -> float:
        return self.size / self.step_size

    def __iter__(self):
        step = self.start_step
        while True:
            indices = [self._sample(step * self.step_size + i) for i in range(self.step_size)]
            own = indices[self.rank :: self.world_size]
            for start in range(0, len(own), self.batch_size):
                yield own[start : start + self.batch_size]
            step += 1

    def _sample(self, position: int) -> int:
        epoch, place = divmod(position, self.size)
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(epoch))
        return int(order[place])


def toy_dataloader(
    dataset: Dataset[Any] | None = None, *, num_workers: int = 0, **sampler: Any
) -> DataLoader[Any]:
    dataset = ToyDataset() if dataset is None else dataset
    sampler = {"batch_size": 2, "accumulation": 2, **sampler}
    return DataLoader(
        dataset,
        batch_sampler=ToySampler(len(dataset), **sampler),
        collate_fn=collate,
        num_workers=num_workers,
    )


def toy_runner(work_dir: Path, *, max_iters: int = 12, **parts: Any) -> Runner:
    parts.setdefault("model", ToyModel())
    parts.setdefault("dataloader", toy_dataloader())
    parts.setdefault("optim_wrapper", {"optimizer": {"type": "AdamW", "lr": 1e-2}})
    parts.setdefault("param_scheduler", {"type": "CosineWarmup", "warmup_iters": 2})
    train_cfg = {"max_iters": max_iters, "accumulation": 2, **parts.pop("train_cfg", {})}
    return Runner.from_parts(work_dir=work_dir, train_cfg=train_cfg, **parts)


def exact_scalars(work_dir: Path) -> list[str]:
    records = read_scalars(work_dir / "scalars.jsonl")
    return [json.dumps({key: record[key] for key in EXACT}) for record in records]
