"""Easy-VQA: 13 short answers about one coloured shape (Victor Zhou, 2019, MIT licence)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from covft.evaluation.benchmark import Benchmark, Item
from covft.registry import BENCHMARKS
from covft.weights import dataset_root


@BENCHMARKS.register_module()
class EasyVQA(Benchmark):
    """The official test split, scored by exact match.

    Args:
        root: The data set's folder; by default it is fetched from the package index once.
        limit: Score only so many questions, from the first on.

    Raises:
        ValueError: If the folder holds no test split, or ``limit`` isn't positive.
    """

    name = "easy_vqa"
    max_new_tokens = 8

    def __init__(self, *, root: str | None = None, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be positive or None, got {limit}")
        self.root = Path(dataset_root("easy-vqa") if root is None else root) / "test"
        if not (self.root / "questions.json").is_file():
            raise ValueError(f"easy-VQA: {self.root / 'questions.json'} not found")
        self.limit = limit

    @cached_property
    def _items(self) -> list[Item]:
        rows = json.loads((self.root / "questions.json").read_text(encoding="utf-8"))
        return [
            Item(
                id=f"{index}",
                question=question,
                answer=answer,
                images=(str(self.root / "images" / f"{image}.png"),),
            )
            for index, (question, answer, image) in enumerate(rows[: self.limit])
        ]

    def items(self) -> Sequence[Item]:
        """Return the questions in the order of the official file."""
        return self._items

    def is_correct(self, prediction: str, item: Item) -> bool:
        """Compare without case, surrounding space and a final full stop."""
        return prediction.strip().rstrip(".").lower() == item.answer
