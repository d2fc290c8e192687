"""CV-Bench (Tong et al., "Cambrian-1", NeurIPS 2024): counting, relations, depth and distance.

The files are those of ``nyu-visionx/CV-Bench``; prompt and scoring follow Cambrian-1's
evaluation. Each source of images is a benchmark of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

from PIL import Image

from covft.evaluation.answers import LETTER_INSTRUCTION, final_letter
from covft.evaluation.benchmark import Benchmark, Item
from covft.evaluation.parquet import ParquetFiles
from covft.evaluation.tables import Row, items_of
from covft.registry import BENCHMARKS

_COLUMNS = ("idx", "type", "task", "question", "choices", "answer", "prompt", "source")
_UNREAD = (
    *("filename", "source_dataset", "source_filename", "target_class", "target_size", "bbox"),
)
#: Sources: name, title, file, official number of questions.
_SOURCES = {
    "COCO": ("cvbench_coco", "COCO", "test_2d.parquet", 805),
    "ADE20K": ("cvbench_ade", "ADE", "test_2d.parquet", 633),
    "Omni3D": ("cvbench_omni3d", "Omni3D", "test_3d.parquet", 1200),
}
_DISTANCES = "Estimate the real-world distances between objects in this image."


@BENCHMARKS.register_module()
class CVBench(Benchmark):
    """The questions on images of one source; accuracy.

    Args:
        root: The folder of both parquet files.
        source: ``COCO``, ``ADE20K`` or ``Omni3D``.
        limit: Ask only the first so many questions.

    Raises:
        ValueError: If ``source`` is another one, or as :class:`Benchmark` does.
    """

    folder = "CV-Bench"
    max_new_tokens = 512

    def __init__(self, *, root: str, source: str = "COCO", limit: int | None = None) -> None:
        if source not in _SOURCES:
            raise ValueError(f"CVBench: source must be {', '.join(_SOURCES)}, got {source!r}")
        super().__init__(root=root, limit=limit)
        self.source = source
        self.name, self.title, file, self.num_official = _SOURCES[source]
        self.file = self.root / file

    @cached_property
    def _table(self) -> ParquetFiles:
        return ParquetFiles([self.file], columns=_COLUMNS, unread=_UNREAD)

    def read_items(self) -> list[Item]:
        """Read the parquet file; its images stay in it."""
        rows = self._table.rows()
        sources = [row.optional("source") or "" for row in rows]
        # Omni3D's rows name its parts, such as Omni3D_SUNRGBD.
        if not any(source.startswith(self.source) for source in sources):
            found = ", ".join(sorted(set(sources)))
            raise ValueError(f"{self.file} has no row of source {self.source}; found {found}")
        # A row without a source may be ours: it is listed.
        ours = [r for r, s in zip(rows, sources, strict=True) if not s or s.startswith(self.source)]
        return items_of(ours, self._item, identify=lambda row: (row.text("idx"), None))

    def _item(self, row: Row) -> Item:
        row.text("source")
        choices, prompt = row.texts("choices"), row.text("prompt")
        question = f"{prompt}\n{LETTER_INSTRUCTION}"
        return Item(
            id=row.text("idx"),
            question=question,
            answer=row.letter("answer", len(choices)),
            images=(f"{row.number}",),
            context=_spatial_context(question) if self.source == "Omni3D" else prompt,
            details={"options": choices, "task": row.optional("task")},
        )

    def unexpected_columns(self) -> Sequence[str]:
        """Return what the table has besides the official columns."""
        return tuple(self._table.unexpected)

    def open_image(self, name: str) -> Image.Image:
        """Open the image of a row."""
        return self._table.open_image(int(name))

    def is_correct(self, prediction: str, item: Item) -> bool:
        """Compare the first character of what the answer comes down to.

        The official scripts differ in the punctuation that they drop behind it, by source: that is
        never a letter.
        """
        return final_letter(prediction).upper() == item.answer


def _spatial_context(question: str) -> str:
    """Return a question on space without its options and the hint at distances (CoVFT's code)."""
    # The hint goes first: what it stood before, or its own line, would keep a space or stay blank.
    lines = re.sub(r"\([A-Z]\).*", "", question.replace(_DISTANCES, "")).splitlines()
    return "\n".join(line.strip() for line in lines if line.strip())
