"""GQA (Hudson and Manning, CVPR 2019): compositional questions about scenes.

Prompt and scoring are LLaVA's (``convert_gqa_for_eval.py`` and GQA's ``eval.py``), of which only
the accuracy is taken: the rest of ``eval.py`` wants files that were never released.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from covft.atomic import atomic_write_text
from covft.evaluation.benchmark import Benchmark, Item
from covft.evaluation.records import keyed_records
from covft.evaluation.tables import Row, items_of
from covft.evaluation.vqa_answers import SHORT_INSTRUCTION
from covft.registry import BENCHMARKS


@BENCHMARKS.register_module()
class GQA(Benchmark):
    """The balanced questions of test-dev; accuracy."""

    name = "gqa"
    title = "GQA"
    folder = "GQA"
    max_new_tokens = 128
    num_official = 12578

    def read_items(self) -> list[Item]:
        """Read ``testdev_balanced_questions.json``; the images are ``images/<imageId>.jpg``."""
        rows = keyed_records(self.root / "testdev_balanced_questions.json").values()
        make = partial(_item, images=str(self.root / "images"))
        return items_of(rows, make, identify=lambda row: (row.text("id"), None))

    def is_correct(self, prediction: str, item: Item) -> bool:
        """Compare without case and full stops at the end."""
        return _answer(prediction) == item.answer

    def export(self, predictions: Mapping[str, str], folder: Path) -> list[Path]:
        """Write ``[{"questionId", "prediction"}]``, which GQA's ``eval.py`` and server read."""
        answers = [
            {"questionId": item.id, "prediction": _answer(predictions[item.id])}
            for item in self.items()
        ]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "testdev_balanced_predictions.json"
        atomic_write_text(path, json.dumps(answers, ensure_ascii=False) + "\n")
        return [path]


def _item(row: Row, *, images: str) -> Item:
    return Item(
        id=row.text("id"),
        question=f"{row.text('question')}\n{SHORT_INSTRUCTION}",
        answer=row.text("answer"),
        images=(f"{images}/{row.text('imageId')}.jpg",),  # pathlib would take most of the time
    )


def _answer(text: str) -> str:
    return text.strip().rstrip(".").lower()
