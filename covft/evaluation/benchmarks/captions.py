"""Captions of Flickr30k (Young et al., TACL 2014) and COCO (Chen et al., 2015, arXiv:1504.00325).

The test splits are Karpathy's (Karpathy and Fei-Fei, CVPR 2015).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from covft.atomic import atomic_write_text
from covft.evaluation.benchmark import Benchmark, Item
from covft.evaluation.caption_metrics import CaptionScorer, metrics
from covft.evaluation.records import listed_records
from covft.evaluation.tables import Row, RowError, is_missing, items_of
from covft.registry import BENCHMARKS

_PROMPT = "Provide a one-sentence caption for the provided image."


class KarpathyCaptions(Benchmark):
    """A caption for each image of the test split: CIDEr, BLEU-1 to BLEU-4 and ROUGE-L, x 100.

    An image that can't be asked about counts 0 in CIDEr, the headline, and in ROUGE-L; BLEU, which
    is no mean over images, is that of the others. ``limit`` changes CIDEr's weights of words, see
    :class:`covft.evaluation.caption_metrics.CaptionScorer`.
    """

    metric = "cider"
    max_new_tokens = 64
    #: Karpathy's file.
    file: ClassVar[str]
    #: The file's name of the number that images have in results.
    id_column: ClassVar[str]

    def read_items(self) -> list[Item]:
        """Read the test split of Karpathy's file."""
        path = self.root / self.file
        rows = [r for r in listed_records(path, "images") if r.problem or _is_test(r)]
        if not rows:
            raise ValueError(f"{path} has no image of the split 'test'")
        return items_of(rows, self._item, identify=lambda row: (self._id(row), None))

    def _id(self, row: Row) -> str:
        if row.problem:  # then it has no number, either
            raise RowError(row.problem)
        return f"{row.integer(self.id_column)}"

    def _item(self, row: Row) -> Item:
        sentences = row.cells.get("sentences")
        if not isinstance(sentences, list):
            raise RowError(f"'sentences' must be a list, found {sentences!r:.60}")
        raw = [one.get("raw") if isinstance(one, dict) else None for one in sentences]
        references = tuple(str(text) for text in raw if not is_missing(text))
        if not references:
            raise RowError("'sentences' holds no caption")
        return Item(
            id=self._id(row),
            question=_PROMPT,
            answer=references,
            images=(str(self._image(row)),),
        )

    def _image(self, row: Row) -> Path:
        raise NotImplementedError

    @cached_property
    def _scorer(self) -> CaptionScorer:
        return CaptionScorer([item.answer for item in self.items() if item.problem is None])

    def check_requirements(self) -> None:
        """Look for pycocoevalcap."""
        metrics()

    def is_correct(self, prediction: str, item: Item) -> bool:
        """Tell whether an answer is one of the references, word for word."""
        said = " ".join(prediction.lower().split()).rstrip(" .")
        return said in (" ".join(text.lower().split()).rstrip(" .") for text in item.answer)

    def item_scores(self, predictions: Mapping[str, str]) -> dict[str, float]:
        """Return CIDEr of each caption: it can be above 1, 10 for the only reference itself."""
        asked = [item for item in self.items() if item.problem is None]
        found = self._scorer.score([predictions[item.id] for item in asked]).cider_of_each
        return {
            **{item.id: 0.0 for item in self.items()},
            **{item.id: score for item, score in zip(asked, found, strict=True)},
        }

    def score(self, predictions: Mapping[str, str]) -> dict[str, float]:
        """Return CIDEr, BLEU-1 to BLEU-4 and ROUGE-L, x 100."""
        self.check_complete(predictions)
        asked = [item for item in self.items() if item.problem is None]
        if not asked:
            return {self.metric: 0.0}
        scores = self._scorer.score([predictions[item.id] for item in asked]).metrics
        share = len(asked) / len(self.items())
        means = {name: share * scores[name] for name in ("cider", "rouge_l")}
        return {**scores, **means}

    def notes(self) -> dict[str, str]:
        """Return which tokenizer split the captions into words."""
        return {"tokenizer": self._scorer.tokenizer}

    def export(self, predictions: Mapping[str, str], folder: Path) -> list[Path]:
        """Write ``[{"image_id", "caption"}]``, the results that COCO's tools read."""
        captions = [
            {"image_id": int(item.id), "caption": predictions[item.id]}
            for item in self.items()
            if item.problem is None
        ]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"captions_{self.name}_results.json"
        atomic_write_text(path, json.dumps(captions, ensure_ascii=False) + "\n")
        return [path]


@BENCHMARKS.register_module()
class Flickr30k(KarpathyCaptions):
    """1,000 images with five captions each."""

    name = "flickr30k"
    title = "Flickr30k"
    folder = "Flickr30k"
    num_official = 1000
    file = "dataset_flickr30k.json"
    id_column = "imgid"

    def _image(self, row: Row) -> Path:
        return self.root / "flickr30k-images" / row.text("filename")


@BENCHMARKS.register_module()
class COCOCaptions(KarpathyCaptions):
    """5,000 images with about five captions each."""

    name = "coco_captions"
    title = "COCO Cap."
    folder = "COCO"
    num_official = 5000
    file = "dataset_coco.json"
    id_column = "cocoid"

    def _image(self, row: Row) -> Path:
        return self.root / row.text("filepath") / row.text("filename")


def _is_test(row: Row) -> bool:
    return row.cells.get("split") == "test"
