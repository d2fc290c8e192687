"""MMBench (Liu et al., "MMBench: Is Your Multi-modal Model an All-around Player?", ECCV 2024).

Its development split has answers, so that CircularEval is scored here, without a server and without
GPT: a question counts if every rotation of its options is answered right. The prompt is LLaVA's
(``model_vqa_mmbench.py`` with ``--single-pred-prompt``). Unlike there, an option "None" is a text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from PIL import Image

from covft.evaluation.answers import LETTER_INSTRUCTION, option_choice, with_options
from covft.evaluation.benchmark import Benchmark, Item
from covft.evaluation.tables import (
    DelimitedFile,
    Row,
    RowError,
    decode_base64,
    decode_image,
    is_missing,
    items_of,
)
from covft.registry import BENCHMARKS

#: Files, instructions and official numbers of rows by language.
_FILES = {"en": "mmbench_dev_20230712.tsv", "cn": "mmbench_dev_cn_20231003.tsv"}
_INSTRUCTIONS = {"en": LETTER_INSTRUCTION, "cn": "请直接回答选项字母。"}
_NUM_ROWS = {"en": 4377, "cn": 4329}
_COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "image")
#: Of the official file, too; not all tables that people cut from it have them.
_FURTHER = ("category", "l2-category", "source", "comment", "split")
_OPTIONS = ("A", "B", "C", "D")
#: Rotations of a question have indices that differ by multiples of it.
_ROTATION = 1_000_000
#: An image cell of so few digits is the index of the row that has the image.
_MAX_REFERENCE = 16


@BENCHMARKS.register_module()
class MMBench(Benchmark):
    """The English or Chinese development split; accuracy under CircularEval.

    Args:
        root: The folder of the TSV file.
        lang: ``en`` or ``cn``.
        limit: Ask only the first so many questions, all rotations of each.

    Raises:
        ValueError: If ``lang`` is another one, or as :class:`Benchmark` does.
    """

    name = "mmbench"
    title = "MMBench"
    folder = "MMBench"
    max_new_tokens = 1024

    def __init__(self, *, root: str, lang: str = "en", limit: int | None = None) -> None:
        if lang not in _FILES:
            raise ValueError(f"MMBench: lang must be en or cn, got {lang!r}")
        super().__init__(root=root, limit=limit)
        self.name, self.title = f"mmbench_{lang}", f"MMB-{lang}"
        self.num_official = _NUM_ROWS[lang]
        self.file = self.root / _FILES[lang]
        self.instruction = _INSTRUCTIONS[lang]

    @cached_property
    def _table(self) -> DelimitedFile:
        return DelimitedFile(self.file, columns=_COLUMNS, delimiter="\t", unread=_FURTHER)

    def read_items(self) -> list[Item]:
        """Read the TSV file; its images stay in it."""
        return items_of(self._image_index.rows, self._item, identify=_identity)

    @cached_property
    def _image_index(self) -> _ImageIndex:
        return _ImageIndex(self._table)

    def _item(self, row: Row) -> Item:
        item_id, group = _identity(row)
        options = _options(row)
        question, hint = row.text("question"), row.optional("hint")
        has_hint = hint is not None and hint.strip().lower() != "none"
        context = with_options(f"{hint}\n{question}" if has_hint else question, [*options.values()])
        details = {"index": int(item_id), "question": question, "options": options}
        categories = ("category", "l2-category")
        details |= {key: row.cells[key] for key in categories if key in row.cells}
        return Item(
            id=item_id,
            question=f"{context}\n{self.instruction}",
            answer=row.letter("answer", len(options)),
            images=(self._image_index.name(row),),
            context=context,
            group=group,
            details=details,
        )

    def unexpected_columns(self) -> Sequence[str]:
        """Return what the table has besides the official columns."""
        return tuple(self._table.unexpected)

    def open_image(self, name: str) -> Image.Image:
        """Open the image in the row of an index."""
        where = f"{self.file.name}, index {name}"
        cell = self._table.cell(self._image_index.spans[name], "image")
        return decode_image(decode_base64(cell, where=where), where=where)

    def is_correct(self, prediction: str, item: Item) -> bool:
        """Compare the option that is named, by letter or else by text."""
        return option_choice(prediction, item.details["options"]) == item.answer

    def export(self, predictions: Mapping[str, str], folder: Path) -> list[Path]:
        """Write the table that the MMBench server takes, as LLaVA's conversion script does."""
        try:
            from openpyxl import Workbook
            from openpyxl.cell import WriteOnlyCell
            from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
        except ImportError as error:
            raise ImportError(
                f"MMBench's export needs openpyxl: pip install -e '.[eval]' ({error})"
            ) from error
        book = Workbook(write_only=True)
        sheet = book.create_sheet("Sheet1")
        sheet.append(["index", "question", *_OPTIONS, "prediction", "answer"])
        for item in self.items():
            options = item.details.get("options", {})
            texts = [item.details.get("question", ""), *(options.get(o, "") for o in _OPTIONS)]
            cells: list[Any] = [item.details.get("index", item.id)]
            for text in [*texts, predictions[item.id], item.answer]:
                cells.append(WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", text)))
                cells[-1].data_type = "s"  # or "=3" would be a formula
            sheet.append(cells)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.xlsx"
        book.save(path)
        return [path]


class _ImageIndex:
    """Rows without their images, and where in the file these are.

    Equal images have one name, so that a model sees an image once for all rotations.

    Args:
        table: The file.

    Attributes:
        rows: The rows; of ``image`` a name is left, or the index of another row.
        spans: Rows in the file, by the name of their image.
    """

    def __init__(self, table: DelimitedFile) -> None:
        self.rows: list[Row] = []
        self.spans: dict[str, tuple[int, int]] = {}
        self._names: dict[str, str] = {}
        names: dict[bytes, str] = {}
        for row in table.rows():
            cell = (row.optional("image") or "").strip()
            index = (row.optional("index") or row.where).strip()
            if cell and not _is_reference(cell):
                name = names.setdefault(blake2b(cell.encode(), digest_size=16).digest(), index)
                self.spans.setdefault(name, row.span)
                self._names[index] = cell = name
            self.rows.append(replace(row, cells={**row.cells, "image": cell}))

    def name(self, row: Row) -> str:
        """Return the name of a row's image.

        Raises:
            RowError: If it has none, nor has the row that it refers to.
        """
        cell = row.text("image")
        if cell not in self._names:
            raise RowError(f"'image' refers to index {cell}, which has no image")
        return self._names[cell]


def _identity(row: Row) -> tuple[str, str]:
    index = row.integer("index")
    return f"{index}", f"{index % _ROTATION}"


def _options(row: Row) -> dict[str, str]:
    there = [letter for letter in _OPTIONS if not is_missing(row.cells.get(letter))]
    if tuple(there) != _OPTIONS[: len(there)] or not there:
        raise RowError(f"options must be filled from A on, found {', '.join(there) or 'none'}")
    return {letter: row.text(letter) for letter in there}


def _is_reference(cell: str) -> bool:
    return len(cell) <= _MAX_REFERENCE and cell.isdecimal()
