"""OCR-VQA (Mishra et al., ICDAR 2019): questions about the covers of books."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

from covft.evaluation.benchmark import Benchmark, Item
from covft.evaluation.records import keyed_records
from covft.evaluation.tables import Row, RowError, items_of
from covft.evaluation.vqa_answers import SHORT_INSTRUCTION
from covft.registry import BENCHMARKS

_TEST = 3


@BENCHMARKS.register_module()
class OCRVQA(Benchmark):
    """The test split (3), about 100,000 questions; accuracy.

    How many there are depends on which covers could still be downloaded.
    """

    name = "ocr_vqa"
    title = "OCR-VQA"
    folder = "OCR-VQA"
    max_new_tokens = 512

    def read_items(self) -> list[Item]:
        """Read ``dataset.json``; the images are ``images/<id>``, with the suffix of their URL."""
        file = self.root / "dataset.json"
        rows = [row for record in keyed_records(file).values() for row in self._rows(record)]
        if not rows:
            raise ValueError(f"{file} has no record of the test split, 'split' {_TEST}")
        return items_of(rows, _item, identify=lambda row: (row.text("item"), None))

    def _rows(self, record: Row) -> Iterator[Row]:
        """Make a row of each question on a book of the test split, or one of a broken book."""
        questions, answers = (record.cells.get(key) for key in ("questions", "answers"))
        split, book, problem = record.cells.get("split"), record.text("id"), record.problem
        if problem is None and split not in (1, 2, _TEST):
            problem = f"'split' must be 1, 2 or {_TEST}, found {split!r}"
        elif problem is None and split != _TEST:
            return
        elif problem is None and not _are_paired(questions, answers):
            problem = "'questions' and 'answers' must be lists of the same length"
        if problem is not None or not isinstance(questions, list) or not isinstance(answers, list):
            yield Row(record.where, record.number, {"item": book}, problem=problem)
            return
        image = self._image(book, record.optional("imageURL") or "")
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            cells = {"question": question, "answer": answer, "image": str(image)}
            where = f"{record.where}, question {number + 1}"
            yield Row(where, number, {**cells, "item": f"{book}/{number}"})

    def _image(self, book: str, url: str) -> Path:
        image = self.root / "images" / f"{book}.jpg"
        if url.endswith(".jpg") or not url:
            return image
        # LLaVA's download saves them all as JPEG; the few others are worth a look.
        other = image.with_suffix(PurePosixPath(urlparse(url).path).suffix)
        return other if other.is_file() else image

    def is_correct(self, prediction: str, item: Item) -> bool:
        """Compare without case and surrounding space."""
        return prediction.strip().lower() == item.answer


def _are_paired(questions: object, answers: object) -> bool:
    are_lists = isinstance(questions, list) and isinstance(answers, list)
    return are_lists and len(questions) == len(answers)  # type: ignore[arg-type]


def _item(row: Row) -> Item:
    question, answer = (str(row.cells.get(key) or "").strip() for key in ("question", "answer"))
    if not question or not answer:
        raise RowError("'question' or 'answer' is empty")
    return Item(
        id=row.text("item"),
        question=f"{question}\n{SHORT_INSTRUCTION}",
        answer=answer.lower(),
        images=(row.text("image"),),
    )
