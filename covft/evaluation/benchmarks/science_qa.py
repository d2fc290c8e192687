"""ScienceQA (Lu et al., "Learn to Explain", NeurIPS 2022): school questions, half with an image.

Prompt and scoring are LLaVA's (``model_vqa_science.py``, ``eval_science_qa.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from covft.evaluation.answers import (
    LETTER_INSTRUCTION,
    LETTERS,
    science_qa_letter,
    with_options,
)
from covft.evaluation.benchmark import Benchmark, Item
from covft.evaluation.tables import Row, RowError, items_of, read_json
from covft.registry import BENCHMARKS


@BENCHMARKS.register_module()
class ScienceQA(Benchmark):
    """The test split. ``accuracy_img``, over questions with an image, is what papers print.

    Those come first, so that ``limit`` begins with them: 2,017 are the whole of ScienceQA-IMG.
    """

    name = "science_qa"
    title = "SQA-I"
    folder = "ScienceQA"
    metric = "accuracy_img"
    max_new_tokens = 1024
    num_official = 4241

    def read_items(self) -> list[Item]:
        """Read ``problems.json`` and the test split of ``pid_splits.json``."""
        file, splits_file = self.root / "problems.json", self.root / "pid_splits.json"
        problems, splits = read_json(file), read_json(splits_file)
        if not isinstance(splits, dict) or not isinstance(splits.get("test"), list):
            raise ValueError(f"{splits_file} has no list 'test'")
        if not isinstance(problems, dict):
            raise ValueError(f"{file} must hold problems by id, found {type(problems).__name__}")
        pids = [str(pid) for pid in splits["test"]]
        rows = [_row(file.name, pid, number, problems) for number, pid in enumerate(pids)]
        rows.sort(key=lambda row: row.optional("image") is None)
        if not rows or rows[0].optional("image") is None:
            raise ValueError(f"{file}: no question of the test split has an image")
        # Not from the items: a broken question has an image, too.
        self._with_image = {row.text("pid") for row in rows if row.optional("image") is not None}
        return items_of(rows, self._item, identify=lambda row: (row.text("pid"), None))

    def _item(self, row: Row) -> Item:
        pid, image, hint = row.text("pid"), row.optional("image"), row.optional("hint")
        choices = row.texts("choices")
        answer = row.integer("answer")
        if not 0 <= answer < len(choices):
            raise RowError(f"'answer' is {answer}, but there are {len(choices)} choices from 0 on")
        asked = row.text("question") if hint is None else f"Context: {hint}\n{row.text('question')}"
        context = with_options(asked, choices)
        return Item(
            id=pid,
            question=f"{context}\n{LETTER_INSTRUCTION}",
            answer=LETTERS[answer],
            images=() if image is None else (str(self.root / "images" / "test" / pid / image),),
            context=context,
            details={"options": choices},
        )

    def is_correct(self, prediction: str, item: Item) -> bool:
        """Compare the letter that LLaVA's evaluator reads."""
        return science_qa_letter(prediction) == item.answer

    def item_scores(self, predictions: Mapping[str, str]) -> dict[str, float]:
        """Return the scores of questions with an image: those that the headline is about."""
        scores = super().item_scores(predictions)
        return {unit: score for unit, score in scores.items() if unit in self._with_image}

    def score(self, predictions: Mapping[str, str]) -> dict[str, float]:
        """Return the accuracy over questions with an image, and over all, in percent."""
        images_only = super().score(predictions)
        scores = super().item_scores(predictions)
        return {
            **images_only,
            "accuracy_all": 100 * sum(scores.values()) / len(scores),
        }


def _row(file: str, pid: str, number: int, problems: Mapping[str, Any]) -> Row:
    cells = problems.get(pid)
    where = f"{file}, problem {pid}"
    if not isinstance(cells, dict):
        return Row(where, number, {"pid": pid}, problem="not there")
    return Row(where, number, {**cells, "pid": pid})
