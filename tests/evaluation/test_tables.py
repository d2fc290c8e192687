import base64
import json
import random
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest
from evaluation.official_files import image_bytes, write_parquet

from covft.evaluation import tables
from covft.evaluation.benchmark import Item
from covft.evaluation.tables import (
    DelimitedFile,
    Row,
    RowError,
    decode_base64,
    decode_image,
    is_missing,
    items_of,
    read_json,
    read_json_lines,
)


def table(path: Path, text: str, columns: Sequence[str] = ("id", "text")) -> DelimitedFile:
    path.write_bytes(text.encode())
    return DelimitedFile(path, columns=columns, delimiter="\t")


def test_cells_that_pandas_would_lose_are_texts() -> None:
    assert not any(map(is_missing, ["None", "NA", "null", "N/A", 0, "0", False]))
    assert all(map(is_missing, [None, float("nan"), "", " \t", "nan", "NaN"]))


def test_a_delimited_file_is_read_as_spreadsheets_write_it(tmp_path: Path) -> None:
    text = '\ufeffid\ttext\tmore\r\n1\t"a ""b""\nc"\tx\r\n\r\n2\tNone\t\r\n3\t狗\r\n'
    file = table(tmp_path / "t.tsv", text)
    rows = list(file.rows())
    assert [row.text("id") for row in rows] == ["1", "2", "3"]
    assert [row.text("text") for row in rows] == ['a "b"\nc', "None", "狗"]
    assert rows[1].optional("more") is None
    assert rows[0].problem is None
    assert rows[2].problem == "2 cells, but the header has 3"
    assert [file.cell(row.span, "text") for row in rows] == ['a "b"\nc', "None", "狗"]
    assert rows[2].where == "t.tsv, row 3"


def test_files_of_another_format_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone.tsv not found; data/README.md"):
        DelimitedFile(tmp_path / "gone.tsv", columns=(), delimiter="\t")
    found = "no column 'text'; expected id, text; found id, txt"
    with pytest.raises(ValueError, match=found):
        list(table(tmp_path / "a.tsv", "id\ttxt\n1\tx\n").rows())
    with pytest.raises(ValueError, match="found nothing"):
        list(table(tmp_path / "b.tsv", "").rows())
    latin = tmp_path / "c.tsv"
    latin.write_bytes("id\ttext\n1\té\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"c.tsv, line 2: .*utf-8"):
        list(DelimitedFile(latin, columns=("id",), delimiter="\t").rows())
    (tmp_path / "d.json").write_text('{"a": 1,\n oops}')
    with pytest.raises(ValueError, match=r"d.json is no JSON: .* line 2 column 2"):
        read_json(tmp_path / "d.json")


def test_aliases_are_columns_under_other_names(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text("lndex,Question\n7,why?\n")
    file = DelimitedFile(path, columns=("Index",), delimiter=",", aliases={"lndex": "Index"})
    assert [row.integer("Index") for row in file.rows()] == [7]
    assert file.cell(next(file.rows()).span, "Index") == "7"


def test_images_in_base64_are_not_kept(tmp_path: Path) -> None:
    noise = random.Random(0)
    images = [base64.b64encode(noise.randbytes(150_000)).decode() for _ in range(20)]
    path = tmp_path / "big.tsv"
    path.write_text("id\ttext\n" + "".join(f"{n}\t{image}\n" for n, image in enumerate(images)))
    file = DelimitedFile(path, columns=("id",), delimiter="\t")
    tracemalloc.start()
    try:
        spans = [row.span for row in file.rows()]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000  # a row is 200 KB, the file 4 MB
    assert [file.cell(span, "text") for span in spans] == images


def test_broken_rows_become_items_with_a_problem() -> None:
    def make(row: Row) -> Item:
        return Item(id=row.text("id"), question=row.text("q"), answer=row.letter("a", 2))

    cells = [
        {"id": "1", "q": "x", "a": "(b)"},
        {"id": "2", "q": float("nan"), "a": "A"},
        {"id": "1", "q": "x", "a": "A"},
        {"id": None, "q": "x", "a": "A"},
        {"id": "5", "q": "x", "a": "C"},
    ]
    rows = [Row(f"f, row {n}", n, c) for n, c in enumerate(cells)]
    rows.append(Row("f, row 5", 5, {"id": "6"}, problem="1 cell"))
    rows.append(Row("f, row 6", 6, {"id": "1"}, problem="1 cell"))
    items = items_of(rows, make, identify=lambda row: (row.text("id"), "group"))
    assert [item.id for item in items] == [
        "1",
        "2",
        "1 (f, row 2)",
        "(f, row 3)",
        "5",
        "6",
        "1 (f, row 6)",
    ]
    assert [item.problem for item in items] == [
        None,
        "f, row 1: 'q' is empty",
        "f, row 2: '1' is there twice",
        "f, row 3: 'id' is empty",
        "f, row 4: 'a' is 'C', but there are 2 options from A on",
        "f, row 5: 1 cell",
        "f, row 6: 1 cell; '1' is there twice",
    ]
    assert items[0].answer == "B"
    assert [item.group for item in items[1:]] == ["group", "group", None, *["group"] * 3]


def test_cells_of_another_kind_are_row_errors() -> None:
    row = Row("f", 0, {"n": "seven", "list": ["a", None], "text": "ab", "empty": []})
    for call, says in [
        (lambda: row.integer("n"), "'n' must be a whole number"),
        (lambda: row.texts("list"), "'list' holds an empty text"),
        (lambda: row.texts("text"), "'text' must hold several texts, found 'ab'"),
        (lambda: row.texts("empty"), r"'empty' must hold several texts"),
        (lambda: row.letter("text", 4), "'text' is 'ab', but there are 4 options"),
    ]:
        with pytest.raises(RowError, match=says):
            call()


def test_json_lines_survive_a_broken_one(tmp_path: Path) -> None:
    path = tmp_path / "ocr.jsonl"
    # A line separator of Unicode within a text ends no line.
    path.write_text(json.dumps({"a": "x\u2028y"}, ensure_ascii=False) + '\n\n{"a": \n[1]\n')
    rows = read_json_lines(path)
    assert rows[0].text("a") == "x\u2028y"
    assert [row.where for row in rows] == [f"ocr.jsonl, line {n}" for n in (1, 3, 4)]
    assert rows[1].problem is not None and rows[1].problem.startswith("no JSON: ")
    assert rows[2].problem == "no JSON object"


def test_broken_images_say_where() -> None:
    good = image_bytes(9)
    assert decode_image(good, where="x").getpixel((0, 0)) == (9, 40, 80)
    assert decode_base64(base64.encodebytes(good).decode(), where="x") == good
    with pytest.raises(ValueError, match="row 1: the image's base64 is broken"):
        decode_base64("not base64!", where="row 1")
    with pytest.raises(ValueError, match="row 2: no image, 4 bytes"):
        decode_image(b"text", where="row 2")
    with pytest.raises(ValueError, match="row 3: the image can't be read"):
        decode_image(good[:45], where="row 3")


def test_parquet_images_come_from_any_file_and_row_group(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from covft.evaluation.parquet import ParquetFiles, parquet_paths

    rows = [{"q": f"{n}", "image": {"bytes": image_bytes(n), "path": "x.png"}} for n in range(7)]
    rows[5]["image"] = None
    rows[6]["image"] = {"bytes": b"junk", "path": "x.png"}
    write_parquet(tmp_path / "data" / "test-0.parquet", rows[:5])
    write_parquet(tmp_path / "data" / "test-1.parquet", rows[5:])
    write_parquet(tmp_path / "data" / "train-0.parquet", rows)
    files = ParquetFiles(parquet_paths(tmp_path), columns=("q",))
    assert [row.text("q") for row in files.rows()] == [f"{n}" for n in range(7)]
    assert [row.number for row in files.rows()] == list(range(7))
    assert files.rows()[5].where == "test-1.parquet, row 1"
    assert [files.open_image(n).getpixel((0, 0))[0] for n in (4, 0, 3)] == [4, 0, 3]
    with pytest.raises(ValueError, match="image of row 6: there is none"):
        files.open_image(5)
    with pytest.raises(ValueError, match="image of row 7: no image, 4 bytes"):
        files.open_image(6)


def test_parquet_may_hold_plain_bytes(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from covft.evaluation.parquet import ParquetFiles

    write_parquet(tmp_path / "a.parquet", [{"q": "x", "image": image_bytes(8)}])
    files = ParquetFiles([tmp_path / "a.parquet"], columns=("q",))
    assert files.open_image(0).getpixel((0, 0))[0] == 8


def test_parquet_files_of_another_format_are_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from covft.evaluation.parquet import ParquetFiles, parquet_paths

    with pytest.raises(ValueError, match=r"no test\*.parquet in"):
        parquet_paths(tmp_path)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"broken\.parquet is no parquet file"):
        ParquetFiles([broken], columns=("q",))
    write_parquet(tmp_path / "a.parquet", [{"question": "x", "image": b""}])
    with pytest.raises(
        ValueError, match=r"no column 'q'; expected q, image; found question, image$"
    ):
        ParquetFiles([tmp_path / "a.parquet"], columns=("q",))


def test_a_damaged_page_costs_its_row_group_only(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from pyarrow.parquet import ParquetFile

    from covft.evaluation.parquet import ParquetFiles

    path = tmp_path / "a.parquet"
    write_parquet(path, [{"q": "x", "image": image_bytes(n)} for n in range(6)])
    column = ParquetFile(path).metadata.row_group(1).column(1)
    assert column.path_in_schema == "image"
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    files = ParquetFiles([path], columns=("q",))
    assert [files.open_image(n).getpixel((0, 0))[0] for n in (0, 1, 4, 5)] == [0, 1, 4, 5]
    for number in (2, 3):
        with pytest.raises(ValueError, match=rf"image of row {number + 1}: a.parquet is damaged"):
            files.open_image(number)


def test_text_in_an_image_column_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from covft.evaluation.parquet import ParquetFiles

    text = base64.b64encode(image_bytes(1)).decode()
    write_parquet(tmp_path / "a.parquet", [{"q": "x", "image": text}])
    files = ParquetFiles([tmp_path / "a.parquet"], columns=("q",))
    with pytest.raises(ValueError, match="row 1: 'image' must hold bytes, found str"):
        files.open_image(0)


def test_a_stray_quote_says_how_many_lines_it_took(tmp_path: Path) -> None:
    file = table(tmp_path / "t.tsv", 'id\ttext\n1\tx\n2\t"y\n3\tz\n4\tw" v\tu\n5\ta\n')
    rows = list(file.rows())
    assert [row.text("id") for row in rows] == ["1", "2", "5"]
    assert rows[1].problem is not None and "it spans 3 lines" in rows[1].problem
    assert [rows[0].problem, rows[2].problem] == [None, None]


def test_unexpected_columns_are_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(tables, "print_log", lambda text, **_: said.append(text))
    file = table(tmp_path / "t.tsv", "id\ttext\tmore\n1\tx\ty\n")
    assert list(file.rows()) and list(file.rows())
    assert file.unexpected == ["more"] and len(said) == 1
    assert "t.tsv has columns that aren't read: 'more'" in said[0]
