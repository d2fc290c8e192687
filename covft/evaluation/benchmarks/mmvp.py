"""MMVP (Tong et al., "Eyes Wide Shut?", CVPR 2024): pairs of images that CLIP confuses.

Both questions about a pair are the same, and both must be answered right. Prompt and scoring follow
Cambrian-1's evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property

from covft.evaluation.answers import LETTER_INSTRUCTION, LETTERS, final_answer, with_options
from covft.evaluation.benchmark import Benchmark, Item
from covft.evaluation.tables import DelimitedFile, Row, RowError, items_of
from covft.registry import BENCHMARKS


@BENCHMARKS.register_module()
class MMVP(Benchmark):
    """All 150 pairs: ``accuracy`` over pairs, ``accuracy_single`` over questions.

    ``limit`` counts pairs.
    """

    name = "mmvp"
    title = "MMVP"
    folder = "MMVP"
    max_new_tokens = 512
    num_official = 300

    @cached_property
    def _table(self) -> DelimitedFile:
        return DelimitedFile(
            self.root / "Questions.csv",
            columns=("Index", "Question", "Options", "Correct Answer"),
            delimiter=",",
            aliases={"lndex": "Index"},  # as the official file spells it
        )

    def unexpected_columns(self) -> Sequence[str]:
        """Return what the table has besides the official columns."""
        return tuple(self._table.unexpected)

    def read_items(self) -> list[Item]:
        """Read ``Questions.csv``; the images are ``MMVP Images/<Index>.jpg``."""
        return items_of(self._table.rows(), self._item, identify=_identity)

    def _item(self, row: Row) -> Item:
        item_id, pair = _identity(row)
        options = _options(row)
        context = with_options(f"{row.text('Question')} Options:", options)
        return Item(
            id=item_id,
            question=f"{context}\n{LETTER_INSTRUCTION}",
            answer=row.letter("Correct Answer", len(options)),
            images=(str(self.root / "MMVP Images" / f"{item_id}.jpg"),),
            context=context,
            group=pair,
            details={"options": options},
        )

    def is_correct(self, prediction: str, item: Item) -> bool:
        """Compare the whole of what the answer comes down to with the letter and the text."""
        assert isinstance(item.answer, str)
        right = item.details["options"][LETTERS.index(item.answer)]
        return final_answer(prediction) in (item.answer.lower(), right.lower())

    def score(self, predictions: Mapping[str, str]) -> dict[str, float]:
        """Return the accuracy over pairs, and over single questions, in percent."""
        scores = super().score(predictions)
        items = self.items()
        right = [i.problem is None and self.is_correct(predictions[i.id], i) for i in items]
        return {**scores, "accuracy_single": 100 * sum(right) / len(right)}


def _identity(row: Row) -> tuple[str, str]:
    index = row.integer("Index")
    return f"{index}", f"pair {(index + 1) // 2}"


def _options(row: Row) -> list[str]:
    text = row.text("Options")
    start, *parts = re.split(r"\(([a-z])\)", text)
    letters, options = parts[::2], [part.strip() for part in parts[1::2]]
    if start.strip() or letters != ["a", "b"] or not all(options):
        raise RowError(f"'Options' must read '(a) ... (b) ...', found '{text}'")
    return options
