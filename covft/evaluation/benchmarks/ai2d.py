"""AI2D (Kembhavi et al., "A Diagram Is Worth a Dozen Images", ECCV 2016): questions on diagrams.

The files are the test split of ``lmms-lab/ai2d``; prompt and scoring follow Cambrian-1's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from PIL import Image

from covft.evaluation.answers import LETTER_INSTRUCTION, LETTERS, final_letter, with_options
from covft.evaluation.benchmark import Benchmark, Item
from covft.evaluation.parquet import ParquetFiles, parquet_paths
from covft.evaluation.tables import Row, RowError, items_of
from covft.registry import BENCHMARKS


@BENCHMARKS.register_module()
class AI2D(Benchmark):
    """The test split; accuracy."""

    name = "ai2d"
    title = "AI2D"
    folder = "AI2D"
    max_new_tokens = 512
    num_official = 3088

    @cached_property
    def _table(self) -> ParquetFiles:
        return ParquetFiles(parquet_paths(self.root), columns=("question", "options", "answer"))

    def read_items(self) -> list[Item]:
        """Read the parquet files; their images stay in them."""
        return items_of(
            self._table.rows(), self._item, identify=lambda row: (f"{row.number}", None)
        )

    def _item(self, row: Row) -> Item:
        options, answer = row.texts("options"), row.integer("answer")
        if not 0 <= answer < len(options):
            raise RowError(f"'answer' is {answer}, but there are {len(options)} options from 0 on")
        question = f"{with_options(row.text('question'), options)}\n{LETTER_INSTRUCTION}"
        return Item(
            id=f"{row.number}",
            question=question,
            answer=LETTERS[answer],
            images=(f"{row.number}",),
            # With the instruction, unlike other benchmarks of multiple choice.
            context=question,
            details={"options": options},
        )

    def unexpected_columns(self) -> Sequence[str]:
        """Return what the table has besides the official columns."""
        return tuple(self._table.unexpected)

    def open_image(self, name: str) -> Image.Image:
        """Open the image of a row."""
        return self._table.open_image(int(name))

    def is_correct(self, prediction: str, item: Item) -> bool:
        """Compare the first character of what the answer comes down to."""
        return final_letter(prediction).upper() == item.answer
