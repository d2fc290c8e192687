"""IconQA (Lu et al., NeurIPS 2021 Datasets and Benchmarks): abstract diagrams, choice of texts."""

from __future__ import annotations

from pathlib import Path

from covft.evaluation.answers import LETTER_INSTRUCTION, LETTERS, option_letter, with_options
from covft.evaluation.benchmark import Benchmark, Item
from covft.evaluation.tables import Row, RowError, items_of, read_json
from covft.registry import BENCHMARKS


@BENCHMARKS.register_module()
class IconQA(Benchmark):
    """The test split's questions with texts to choose from; accuracy of the letter."""

    name = "icon_qa"
    title = "IconQA"
    folder = "IconQA"
    max_new_tokens = 512
    num_official = 6316

    def read_items(self) -> list[Item]:
        """Read ``test/choose_txt/<id>/data.json`` of all ids."""
        folder = self.root / "test" / "choose_txt"
        if not folder.is_dir():
            raise ValueError(f"{folder} not found; data/README.md tells the layout")
        found = [path for path in folder.iterdir() if path.is_dir()]
        found.sort(key=lambda path: (len(path.name), path.name))
        if not found:
            raise ValueError(f"{folder} holds no questions; data/README.md tells the layout")
        rows = [_row(path, number) for number, path in enumerate(found)]
        return items_of(rows, self._item, identify=lambda row: (row.text("id"), None))

    def _item(self, row: Row) -> Item:
        choices, answer = row.texts("choices"), row.integer("answer")
        if not 0 <= answer < len(choices):
            raise RowError(f"'answer' is {answer}, but there are {len(choices)} choices from 0 on")
        context = with_options(row.text("question"), choices)
        return Item(
            id=row.text("id"),
            question=f"{context}\n{LETTER_INSTRUCTION}",
            answer=LETTERS[answer],
            images=(row.text("image"),),
            context=context,
            details={"options": choices},
        )

    def is_correct(self, prediction: str, item: Item) -> bool:
        """Compare the letter that the answer names."""
        return option_letter(prediction, LETTERS[: len(item.details["options"])]) == item.answer


def _row(folder: Path, number: int) -> Row:
    where = f"choose_txt/{folder.name}/data.json"
    cells = {"id": folder.name, "image": str(folder / "image.png")}
    try:
        data = read_json(folder / "data.json")
    except ValueError as error:
        return Row(where, number, cells, problem=str(error))
    if not isinstance(data, dict):
        return Row(where, number, cells, problem="no JSON object")
    return Row(where, number, {**data, **cells})
