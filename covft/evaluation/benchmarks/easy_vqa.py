"""Easy-VQA: 13 short answers about one coloured shape (Victor Zhou, 2019, MIT licence)."""

from __future__ import annotations

import json
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
    title = "easy-VQA"
    folder = "easy-VQA"
    max_new_tokens = 8
    num_official = 9673

    def __init__(self, *, root: str | None = None, limit: int | None = None) -> None:
        super().__init__(root=str(dataset_root("easy-vqa")) if root is None else root, limit=limit)
        if not self._questions.is_file():
            raise ValueError(f"easy-VQA: {self._questions} not found")

    def read_items(self) -> list[Item]:
        """Return the questions in the order of the official file."""
        images = self.root / "test" / "images"
        rows = json.loads(self._questions.read_text(encoding="utf-8"))
        return [
            Item(
                id=f"{index}",
                question=question,
                answer=answer,
                images=(str(images / f"{image}.png"),),
            )
            for index, (question, answer, image) in enumerate(rows)
        ]

    def is_correct(self, prediction: str, item: Item) -> bool:
        """Compare without case, surrounding space and a final full stop."""
        return prediction.strip().rstrip(".").lower() == item.answer

    @property
    def _questions(self) -> Path:
        return self.root / "test" / "questions.json"
