"""RealWorldQA (xAI, 2024, CC BY-ND 4.0): questions on photographs, many from vehicles.

Every question carries its own instruction. Scoring follows Cambrian-1's evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from PIL import Image

from covft.evaluation.benchmark import Benchmark, Item
from covft.evaluation.parquet import ParquetFiles, parquet_paths
from covft.evaluation.tables import Row, items_of
from covft.registry import BENCHMARKS


@BENCHMARKS.register_module()
class RealWorldQA(Benchmark):
    """The test split; accuracy."""

    name = "real_world_qa"
    title = "RWQA"
    folder = "RealWorldQA"
    max_new_tokens = 512
    num_official = 765

    @cached_property
    def _table(self) -> ParquetFiles:
        return ParquetFiles(parquet_paths(self.root), columns=("question", "answer"))

    def read_items(self) -> list[Item]:
        """Read the parquet files; their images stay in them."""
        return items_of(self._table.rows(), _item, identify=lambda row: (f"{row.number}", None))

    def unexpected_columns(self) -> Sequence[str]:
        """Return what the table has besides the official columns."""
        return tuple(self._table.unexpected)

    def open_image(self, name: str) -> Image.Image:
        """Open the image of a row."""
        return self._table.open_image(int(name))

    def is_correct(self, prediction: str, item: Item) -> bool:
        """Compare the first word behind the last "answer is" (or the first at all)."""
        words = prediction.lower().split("answer is")[-1].strip().rstrip(".").split()
        assert isinstance(item.answer, str)
        return bool(words) and words[0] == item.answer.strip().lower()


def _item(row: Row) -> Item:
    return Item(
        id=f"{row.number}",
        question=row.text("question"),
        answer=row.text("answer"),
        images=(f"{row.number}",),
    )
