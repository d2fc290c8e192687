"""TextVQA (Singh et al., CVPR 2019): questions that need the text in an image to be read.

Prompts are those of LLaVA's ``llava_textvqa_val_v051_ocr.jsonl``, with tokens that an OCR system
read; scoring is that of LLaVA's ``eval_textvqa.py``.
"""

from __future__ import annotations

from collections import defaultdict

from covft.evaluation.benchmark import Item
from covft.evaluation.records import listed_records
from covft.evaluation.tables import Row, RowError, items_of, read_json_lines
from covft.evaluation.vqa_answers import ConsensusVQA, human_answers
from covft.registry import BENCHMARKS

_PROMPTS = "llava_textvqa_val_v051_ocr.jsonl"


@BENCHMARKS.register_module()
class TextVQA(ConsensusVQA):
    """The validation split; accuracy against ten people's answers."""

    name = "text_vqa"
    title = "TextVQA"
    folder = "TextVQA"
    max_new_tokens = 128
    num_official = 5000

    def read_items(self) -> list[Item]:
        """Read ``TextVQA_0.5.1_val.json``, and the prompts from LLaVA's file.

        The prompts' "question_id" is the image's; they are matched by image and question.
        """
        rows = listed_records(self.root / "TextVQA_0.5.1_val.json", "data")
        self._prompts: dict[tuple[str, str], list[str]] = defaultdict(list)
        for row in read_json_lines(self.root / _PROMPTS):
            prompt = row.optional("text")
            if row.problem is None and prompt is not None:
                question = prompt.partition("\n")[0]
                self._prompts[_key(row.optional("question_id"), question)].append(prompt)
        return items_of(rows, self._item, identify=lambda row: (_id(row), None))

    def _item(self, row: Row) -> Item:
        image, question = row.text("image_id"), row.text("question")
        prompts = self._prompts.get(_key(image, question))
        if not prompts:
            raise RowError(f"{_PROMPTS} has no line on image {image} that asks '{question}'")
        return Item(
            id=_id(row),
            question=prompts[0],
            answer=human_answers(row, row.cells.get("answers")),
            images=(str(self.root / "train_images" / f"{image}.jpg"),),
        )


def _key(image: str | None, question: str) -> tuple[str, str]:
    return image or "", question.strip().lower()


def _id(row: Row) -> str:
    # A part of the annotations may have been taken without ids; places are stable, too.
    return row.optional("question_id") or f"{row.number}"
