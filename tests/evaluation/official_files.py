"""Miniature benchmarks of multiple choice in the formats of their official files.

Each writer fills a folder and returns the answers of a worked example by item id.
"""

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

MMBENCH_COLUMNS = (
    *("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"),
    *("source", "l2-category", "comment", "split"),
)


def image_bytes(shade: int, kind: str = "PNG") -> bytes:
    """Return an image file, plainly of one colour."""
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), (shade % 256, 40, 80)).save(stream, kind)
    return stream.getvalue()


def write_image(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_bytes(shade, "JPEG" if path.suffix == ".jpg" else "PNG"))


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as Hugging Face does: images as structs, in row groups of several rows."""
    import pyarrow
    from pyarrow.parquet import write_table

    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(pyarrow.Table.from_pylist(list(rows)), path, row_group_size=2)


def hf_image(shade: int) -> dict[str, Any]:
    return {"bytes": image_bytes(shade), "path": None}


def write_tsv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)


def mmbench_row(index: int, options: str, answer: str, **cells: Any) -> dict[str, Any]:
    """Return a row; all rotations of a question have the same image."""
    image = base64.b64encode(image_bytes(index % 1_000_000)).decode()
    texts = dict(zip("ABCD", options.split(","), strict=False))
    row = {"index": index, "question": "Which animal is it?", "answer": answer, "image": image}
    rest = {"category": "object", "l2-category": "perception", "source": "x", "split": "dev"}
    return {**row, **rest, **texts, **cells}


def write_mmbench(root: Path, lang: str = "en") -> dict[str, str]:
    rows = [
        mmbench_row(1, "cat,dog", "A", hint="It purrs."),
        mmbench_row(2, "cat,dog,cow", "B"),
        mmbench_row(3, "dog,tree", "A", question='A "question"\nof two lines?'),
        mmbench_row(1000001, "dog,cat", "B", hint="It purrs.", image="1"),
        mmbench_row(1000002, "dog,cow,cat", "A"),
        mmbench_row(1000003, "tree,dog", "B"),
        mmbench_row(2000002, "cow,cat,dog", "C"),
    ]
    name = {"en": "mmbench_dev_20230712.tsv", "cn": "mmbench_dev_cn_20231003.tsv"}[lang]
    write_tsv(root / name, rows, MMBENCH_COLUMNS)
    ids = ("1", "2", "3", "1000001", "1000002", "1000003", "2000002")
    said = ("A", "B", "The dog", "B", "A. dog", "B.", "B")
    return dict(zip(ids, said, strict=True))


def write_science_qa(root: Path) -> dict[str, str]:
    def problem(answer: int, *, image: str | None, hint: str = "", split: str = "test") -> dict:
        texts = {"question": "What is it?", "choices": ["root", "leaf"], "hint": hint}
        return {**texts, "answer": answer, "image": image, "split": split}

    problems = {
        "4": problem(1, image=None),
        "5": problem(0, image="image.png", hint="Plants are green."),
        "6": problem(1, image="image.png", split="train"),
        "11": problem(1, image="image.png"),
        "12": problem(1, image="image.png"),
    }
    write_json(root / "problems.json", problems)
    write_json(root / "pid_splits.json", {"train": ["6"], "test": ["4", "5", "11", "12"]})
    for pid in (5, 11, 12):
        write_image(root / "images" / "test" / f"{pid}" / "image.png", pid)
    return {"5": "A", "11": "B. leaf", "12": "B.", "4": "The answer is B."}


def write_ai2d(root: Path) -> dict[str, str]:
    options = ["egg", "larva", "pupa", "adult"]
    rows = [
        {"question": f"Stage {n}?", "options": options, "answer": answer, "image": hf_image(n)}
        for n, answer in enumerate("023")
    ]
    write_parquet(root / "data" / "test-00000-of-00001.parquet", rows)
    return {"0": "A", "1": "The answer is (C).", "2": "b. leaf"}


def write_mmvp(root: Path) -> dict[str, str]:
    answers = ("(a)", "(b)", "(a)", "(b)", "(b)", "(a)")
    root.mkdir(parents=True, exist_ok=True)
    with (root / "Questions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["lndex", "Question", "Options", "Correct Answer"])
        for index, answer in enumerate(answers, start=1):
            writer.writerow(
                [index, "Are the wings, open or closed?", "(a) Open (b) Closed", answer]
            )
            write_image(root / "MMVP Images" / f"{index}.jpg", index)
    said = ("A", "(b)", "B", "B", "closed", "a. open")
    return {f"{index}": text for index, text in enumerate(said, start=1)}


def write_real_world_qa(root: Path) -> dict[str, str]:
    ask = "Please answer directly with a single word or number."
    letter = "Please answer directly with only the letter of the correct option and nothing else."
    texts = [
        (f"Which way?\nA. Left\nB. Right\n{letter}", "A"),
        (f"How many cars?\n{ask}", "3"),
        (f"How many dogs?\n{ask}", "2"),
    ]
    rows = [
        {"question": question, "answer": answer, "image": hf_image(n)}
        for n, (question, answer) in enumerate(texts)
    ]
    write_parquet(root / "data" / "test-00000-of-00002.parquet", rows[:2])
    write_parquet(root / "data" / "test-00001-of-00002.parquet", rows[2:])
    return {"0": "A", "1": "The answer is 3.", "2": "two"}


def cv_bench_row(
    idx: int, source: str, answer: str, choices: Sequence[str], question: str, hint: str = ""
) -> dict[str, Any]:
    options = "\n".join(f"({'ABCDEF'[n]}) {choice}" for n, choice in enumerate(choices))
    kind, task = ("3D", "Distance") if source.startswith("Omni3D") else ("2D", "Relation")
    texts = {"question": question, "prompt": f"{hint}{question}\n{options}"}
    rest = {"idx": idx, "type": kind, "task": task, "choices": list(choices), "answer": answer}
    return {**rest, **texts, "image": hf_image(idx), "source": source, "filename": f"{idx}.png"}


def write_cv_bench(root: Path) -> dict[str, dict[str, str]]:
    """Write both files; return the answers by source."""
    where = "Where is the cup? Select from the following choices."
    left = ["right", "left", "above", "below"]
    rows = [
        cv_bench_row(0, "ADE20K", "(A)", left, where),
        cv_bench_row(1, "COCO", "(A)", left, where),
        cv_bench_row(2, "COCO", "(B)", left, where),
        cv_bench_row(3, "ADE20K", "(B)", left, where),
        cv_bench_row(4, "ADE20K", "(B)", left, where),
        cv_bench_row(5, "COCO", "(D)", left, where),
    ]
    write_parquet(root / "test_2d.parquet", rows)
    closer = "Which object is closer to the table, the bin or the chair?"
    estimate = "Estimate the real-world distances between objects in this image. "
    answers = {"Omni3D_SUNRGBD": "(A)", "Omni3D_Hypersim": "(B)", "Omni3D_nuScenes": "(A)"}
    rows = [
        cv_bench_row(idx, source, answer, ["bin", "chair"], closer, estimate)
        for idx, (source, answer) in enumerate(answers.items(), start=1438)
    ]
    write_parquet(root / "test_3d.parquet", rows)
    return {
        "COCO": {"1": "A", "2": "(B) left", "5": "C"},
        "ADE20K": {"0": "(A)", "3": "Answer: B.", "4": "2"},
        "Omni3D": {"1438": "A.", "1439": "(B", "1440": "bin"},
    }


def write_icon_qa(root: Path) -> dict[str, str]:
    for pid, answer in (("9", 0), ("10", 1), ("102", 1)):
        folder = root / "test" / "choose_txt" / pid
        texts = {"question": "What has been done?", "choices": ["circle", "square"]}
        write_json(folder / "data.json", {**texts, "answer": answer, "ques_type": "choose_txt"})
        write_image(folder / "image.png", int(pid))
    return {"9": "A", "10": "(B) square", "102": "circle"}


def write_choice_benchmarks(data_root: Path) -> dict[str, dict[str, str]]:
    """Write all of them under a data root; return the answers by benchmark."""
    cv_bench = write_cv_bench(data_root / "CV-Bench")
    return {
        "mmbench_en": write_mmbench(data_root / "MMBench"),
        "mmbench_cn": write_mmbench(data_root / "MMBench", "cn"),
        "science_qa": write_science_qa(data_root / "ScienceQA"),
        "ai2d": write_ai2d(data_root / "AI2D"),
        "mmvp": write_mmvp(data_root / "MMVP"),
        "real_world_qa": write_real_world_qa(data_root / "RealWorldQA"),
        "cvbench_coco": cv_bench["COCO"],
        "cvbench_ade": cv_bench["ADE20K"],
        "cvbench_omni3d": cv_bench["Omni3D"],
        "icon_qa": write_icon_qa(data_root / "IconQA"),
    }
