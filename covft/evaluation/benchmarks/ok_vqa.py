"""OK-VQA (Marino et al., CVPR 2019): questions that need knowledge beyond the image."""

from __future__ import annotations

from covft.evaluation.benchmark import Item
from covft.evaluation.records import listed_records
from covft.evaluation.tables import Row, RowError, items_of
from covft.evaluation.vqa_answers import SHORT_INSTRUCTION, ConsensusVQA, human_answers
from covft.registry import BENCHMARKS

_ANNOTATIONS = "mscoco_val2014_annotations.json"


@BENCHMARKS.register_module()
class OKVQA(ConsensusVQA):
    """The test split, on images of COCO val2014; accuracy against ten answers.

    What people said is the annotations' "answer", their stemmed form, as in the official
    evaluation. Images are taken from ``../COCO/val2014`` if there is no ``val2014``.
    """

    name = "ok_vqa"
    title = "OK-VQA"
    folder = "OKVQA"
    max_new_tokens = 512
    num_official = 5046

    def read_items(self) -> list[Item]:
        """Read the questions and the annotations, which have the same ids."""
        rows = listed_records(self.root / "OpenEnded_mscoco_val2014_questions.json", "questions")
        annotations = listed_records(self.root / _ANNOTATIONS, "annotations")
        self._answers = {
            row.optional("question_id"): row.cells.get("answers") for row in annotations
        }
        own = self.root / "val2014"
        self._images = own if own.is_dir() else self.root.parent / "COCO" / "val2014"
        return items_of(rows, self._item, identify=lambda row: (row.text("question_id"), None))

    def _item(self, row: Row) -> Item:
        item_id, image = row.text("question_id"), row.integer("image_id")
        if item_id not in self._answers:
            raise RowError(f"{_ANNOTATIONS} has no question {item_id}")
        answers = self._answers[item_id]
        if isinstance(answers, list):
            answers = [one.get("answer") if isinstance(one, dict) else one for one in answers]
        return Item(
            id=item_id,
            question=f"{row.text('question')}\n{SHORT_INSTRUCTION}",
            answer=human_answers(row, answers),
            images=(str(self._images / f"COCO_val2014_{image:012d}.jpg"),),
        )
