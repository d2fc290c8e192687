"""MME (Fu et al., 2023, arXiv:2306.13394): two yes-or-no questions about each image.

Prompts are LLaVA's; answers are read as by the official ``eval_tool/calculation.py``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from covft.atomic import atomic_write_text
from covft.evaluation.benchmark import Benchmark, Item
from covft.evaluation.tables import Row, RowError, items_of
from covft.evaluation.vqa_answers import SHORT_INSTRUCTION
from covft.registry import BENCHMARKS

PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = (
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
)
_NUM_PERCEPTION, _NUM_COGNITION = 2114, 260
_INSTRUCTION = " Please answer yes or no."
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@BENCHMARKS.register_module()
class MME(Benchmark):
    """The ten subtasks of perception, and those of cognition if they are there.

    A subtask's score is 100 (acc + acc+): the share of right answers, and that of images with both
    answers right. ``perception`` is their sum, 2,000 at most; ``cognition`` likewise, 800 at most.

    ``limit`` counts images, taken from the subtasks in turn; where it leaves subtasks out, the
    others' mean stands for them in the sum. Cognition comes last.
    """

    name = "mme"
    title = "MME-P"
    folder = "MME"
    max_new_tokens = 128
    metric = "perception"
    max_score = 2000.0
    num_official: int | None = _NUM_PERCEPTION

    def read_items(self) -> list[Item]:
        """Read the subtasks' folders, in ``root`` or up to two folders below it."""
        folder = self._subtasks_folder()
        texts = {task: _texts(folder / task) for task in (*PERCEPTION, *COGNITION)}
        missing = [task for task in PERCEPTION if not texts[task]]
        if missing:
            raise ValueError(
                f"{folder} has no questions of {', '.join(missing)}; data/README.md tells the "
                "layout"
            )
        if any(texts[task] for task in COGNITION):
            self.num_official = _NUM_PERCEPTION + _NUM_COGNITION
        rows = [
            row
            for tasks in (PERCEPTION, COGNITION)
            for text in _in_turn([texts[task] for task in tasks])
            for row in _rows(text)
        ]
        return items_of(rows, _item, identify=_identity)

    def _subtasks_folder(self) -> Path:
        for pattern in (PERCEPTION[0], f"*/{PERCEPTION[0]}", f"*/*/{PERCEPTION[0]}"):
            for found in sorted(self.root.glob(pattern)):
                if found.is_dir():
                    return found.parent
        raise ValueError(
            f"no folder '{PERCEPTION[0]}' in {self.root} or up to two folders below; "
            "data/README.md tells the layout"
        )

    def is_correct(self, prediction: str, item: Item) -> bool:
        """Compare the yes or no that the answer begins with."""
        return _yes_or_no(prediction) == item.answer

    def item_scores(self, predictions: Mapping[str, str]) -> dict[str, float]:
        """Return (share of right answers + whether all are right) / 2 of each image of perception.

        The mean over a subtask's images, times 200, is its score.
        """
        scores = self._scores(predictions)
        return {unit: score for unit, score in scores.items() if _task(unit) in PERCEPTION}

    def strata(self) -> dict[str, str]:
        """Return the images' subtasks, of perception alone."""
        units = {item.unit: _task(item.unit) for item in self.items()}
        return {unit: task for unit, task in units.items() if task in PERCEPTION}

    def score(self, predictions: Mapping[str, str]) -> dict[str, float]:
        """Return the sums over perception and cognition, and each subtask's score."""
        self.check_complete(predictions)
        by_task: dict[str, list[float]] = defaultdict(list)
        for unit, score in self._scores(predictions).items():
            by_task[_task(unit)].append(score)
        scores = {task: 200 * sum(found) / len(found) for task, found in by_task.items()}
        totals = {self.metric: _total(scores, PERCEPTION)}
        if any(task in scores for task in COGNITION):
            totals["cognition"] = _total(scores, COGNITION)
        return {**totals, **scores}

    def _scores(self, predictions: Mapping[str, str]) -> dict[str, float]:
        right: dict[str, list[bool]] = defaultdict(list)
        for item in self.items():
            is_right = item.problem is None and self.is_correct(predictions[item.id], item)
            right[item.unit].append(is_right)
        return {unit: (sum(found) / len(found) + all(found)) / 2 for unit, found in right.items()}

    def export(self, predictions: Mapping[str, str], folder: Path) -> list[Path]:
        """Write ``<subtask>.txt`` as ``eval_tool/calculation.py`` reads them.

        Each line is image, question, reference and answer, between tabs; an image's two lines
        follow each other, and images with a broken question are left out.
        """
        broken = {item.unit for item in self.items() if item.problem is not None}
        lines: dict[str, list[str]] = defaultdict(list)
        for item in self.items():
            if item.unit not in broken:
                cells = (item.details["image"], item.details["question"], item.details["answer"])
                said = " ".join(predictions[item.id].split())
                lines[_task(item.unit)].append("\t".join((*cells, said)))
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for task, found in lines.items():
            paths.append(folder / f"{task}.txt")
            atomic_write_text(paths[-1], "\n".join(found) + "\n")
        return paths


def _texts(folder: Path) -> list[tuple[Path, Path]]:
    """Return a subtask's files of questions, each with its image, in the order of their names."""
    nested = folder / "questions_answers_YN"
    is_nested = nested.is_dir()
    images = folder / "images" if is_nested else folder
    found = images.iterdir() if images.is_dir() else ()
    by_stem = {path.stem: path for path in found if path.suffix.lower() in _IMAGE_SUFFIXES}
    texts = (nested if is_nested else folder).glob("*.txt")
    return [
        (text, by_stem.get(text.stem, images / f"{text.stem}.jpg"))
        for text in sorted(texts)
        if not text.name.startswith(".")  # macOS leaves such files in archives
    ]


def _in_turn(lists: Sequence[Sequence[tuple[Path, Path]]]) -> Iterator[tuple[Path, Path]]:
    for firsts in zip_longest(*lists):
        yield from (one for one in firsts if one is not None)


def _rows(text: tuple[Path, Path]) -> Iterator[Row]:
    """Make a row of each line, which should be two."""
    path, image = text
    task = path.parent.parent.name if path.parent.name == "questions_answers_YN" else None
    unit = f"{task or path.parent.name}/{path.stem}"
    try:
        content, problem = path.read_text(encoding="utf-8-sig"), None
    except UnicodeDecodeError as error:
        content, problem = "", f"isn't UTF-8: {error}"
    lines = [line.strip() for line in content.split("\n") if line.strip()]
    if len(lines) != 2 and problem is None:
        problem = f"{len(lines)} questions, expected 2"
    for number in range(max(len(lines), 2)):
        cells = {"unit": unit, "number": number + 1, "image": str(image)}
        cells["line"] = lines[number] if number < len(lines) else ""
        yield Row(f"{unit}.txt, line {number + 1}", number, cells, problem=problem)


def _identity(row: Row) -> tuple[str, str]:
    unit = row.text("unit")
    return f"{unit}/{row.text('number')}", unit


def _item(row: Row) -> Item:
    item_id, unit = _identity(row)
    question, tab, answer = row.text("line").partition("\t")
    if not tab or answer.strip().lower() not in ("yes", "no"):
        raise RowError(f"expected a question, a tab and Yes or No, found '{row.text('line')}'")
    image = Path(row.text("image"))
    return Item(
        id=item_id,
        question=f"{question.replace(_INSTRUCTION, '')}\n{SHORT_INSTRUCTION}",
        answer=answer.strip().lower(),
        images=(str(image),),
        group=unit,
        details={"image": image.name, "question": question, "answer": answer.strip()},
    )


def _task(unit: str) -> str:
    return unit.partition("/")[0]


def _yes_or_no(text: str) -> str:
    """Return what the official evaluator reads: "yes" or "no" in the first four characters."""
    start = text.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def _total(scores: Mapping[str, float], tasks: Sequence[str]) -> float:
    found = [scores[task] for task in tasks if task in scores]
    return len(tasks) * sum(found) / len(found)
