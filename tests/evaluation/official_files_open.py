"""Miniature benchmarks of open answers in the formats of their official files.

Each writer fills a folder and returns the answers of a worked example by item id.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.official_files import write_image, write_json

NESTED_SUBTASKS = ("artwork", "celebrity", "landmark", "posters", "scene")
FLAT_SUBTASKS = ("count", "position", "color", "OCR")
COGNITION_SUBTASKS = (
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
)


def write_mme_image(
    folder: Path, name: str, answers: Sequence[str], *, nested: bool, shade: int = 0
) -> None:
    """Write an image of a subtask and its questions."""
    questions = [f"Is there a {noun} in {name}? Please answer yes or no." for noun in "xyz"]
    text = folder / "questions_answers_YN" if nested else folder
    text.mkdir(parents=True, exist_ok=True)
    lines = [f"{q}\t{a}" for q, a in zip(questions, answers, strict=False)]
    (text / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    write_image((folder / "images" if nested else folder) / f"{name}.jpg", shade)


def write_mme(root: Path, *, cognition: bool = False, inside: str = "") -> dict[str, str]:
    """Write all subtasks of perception; the example is existence's, all else is answered right."""
    root = root / "MME_Benchmark_release_version" / inside
    for shade, answers in enumerate((("Yes", "No"), ("Yes", "No"), ("Yes", "No"))):
        write_mme_image(root / "existence", f"00{shade}", answers, nested=False, shade=shade)
    said = ("Yes", "No.", "yes, it is", "Yes", "The answer is yes", "no")
    answers = {f"existence/00{n // 2}/{n % 2 + 1}": text for n, text in enumerate(said)}
    for task in (*NESTED_SUBTASKS, *FLAT_SUBTASKS, *(COGNITION_SUBTASKS if cognition else ())):
        write_mme_image(root / task, "007", ("No", "Yes"), nested=task in NESTED_SUBTASKS)
        answers |= {f"{task}/007/1": "no", f"{task}/007/2": "Yes."}
    return answers


def write_gqa(root: Path) -> dict[str, str]:
    truth = {"201307251": "yes", "201640614": "left", "202225914": "computer"}
    questions = {
        qid: {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "x (1)"}],
            "entailed": [],
            "equivalent": [qid],
            "question": f"What is it, {qid}?",
            "imageId": f"n{qid}",
            "isBalanced": True,
            "groups": {"global": None, "local": "x"},
            "answer": answer,
            "semanticStr": "select: x (1)",
            "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
            "types": {"detailed": "x", "semantic": "obj", "structural": "query"},
            "fullAnswer": "It is.",
        }
        for qid, answer in truth.items()
    }
    write_json(root / "testdev_balanced_questions.json", questions)
    for shade, qid in enumerate(truth):
        write_image(root / "images" / f"n{qid}.jpg", shade)
    return dict(zip(truth, ("Yes.", "Left", "a computer"), strict=True))


def write_json_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


HUMAN_ANSWERS = (
    ["dakota"] * 7 + ["dakota digital"] * 3,
    ["clos culombu"] * 2 + ["culombu"] * 5 + ["clos"] * 3,
    ["tea"] * 10,
)


def write_text_vqa(root: Path) -> dict[str, str]:
    """Write the annotations and the prompts; two questions are about one image."""
    images = ("003a8ae2ef43b901", "4e5ae48a59d6c1e2", "4e5ae48a59d6c1e2")
    questions = ("what is the brand of this camera?", "what does it say?", "what is on sale?")
    data, prompts = [], []
    for n, (image, question) in enumerate(zip(images, questions, strict=True)):
        cells = {"question": question, "image_id": image, "answers": HUMAN_ANSWERS[n]}
        rest = {"image_classes": ["Camera"], "question_tokens": [], "set_name": "val"}
        data.append({**cells, **rest, "question_id": 34602 + n, "flickr_300k_url": "x"})
        text = f"{question.capitalize()}\nReference OCR token: DAKOTA, TOKEN{n}"
        text += "\nAnswer the question using a single word or phrase."
        ids = {"question_id": image, "image": f"{image}.jpg", "category": "default"}
        prompts.append({**ids, "text": text})
    content = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write_json(root / "TextVQA_0.5.1_val.json", {**content, "data": data})
    write_json_lines(root / "llava_textvqa_val_v051_ocr.jsonl", prompts[::-1])
    for shade, image in enumerate(dict.fromkeys(images)):
        write_image(root / "train_images" / f"{image}.jpg", shade)
    return {"34602": "Dakota", "34603": "clos culombu", "34604": "the coffee"}


def write_ok_vqa(root: Path) -> dict[str, str]:
    ids = (2971475, 3397615, 4250025)
    questions = [
        {"image_id": 297 + n, "question": f"What is it, {qid}?", "question_id": qid}
        for n, qid in enumerate(ids)
    ]
    annotations = [
        {
            "image_id": 297 + n,
            "question_id": qid,
            "question_type": "one",
            "answer_type": "other",
            "confidence": 3,
            "answers": [
                {"answer_id": k + 1, "answer": a, "raw_answer": f"{a}s", "answer_confidence": "yes"}
                for k, a in enumerate(HUMAN_ANSWERS[n])
            ],
        }
        for n, qid in enumerate(ids)
    ]
    about = {"info": {}, "data_type": "mscoco", "data_subtype": "val2014", "license": {}}
    name = "OpenEnded_mscoco_val2014_questions.json"
    write_json(root / name, {**about, "task_type": "Open-Ended", "questions": questions})
    name = "mscoco_val2014_annotations.json"
    write_json(root / name, {**about, "annotations": annotations[::-1]})
    for n in range(3):
        write_image(root / "val2014" / f"COCO_val2014_{297 + n:012d}.jpg", n)
    return dict(zip(map(str, ids), ("Dakota", "clos culombu", "the coffee"), strict=True))


def write_ocr_vqa(root: Path) -> dict[str, str]:
    def book(key: str, suffix: str, split: int) -> dict[str, Any]:
        return {
            "imageURL": f"http://ecx.images-amazon.com/images/I/{key}{suffix}",
            "questions": ["Who wrote this book?", "Is this a sci-fi book?"],
            "answers": ["Jane O. Doe", "No"],
            "title": "A Title",
            "authorName": "Jane O. Doe",
            "genre": "Travel",
            "split": split,
        }

    books = {"0761183272": (".jpg", 1), "1421539896": (".jpg", 3), "B00002": (".gif", 3)}
    content = {key: book(key, *what) for key, what in books.items()}
    write_json(root / "dataset.json", content)
    write_image(root / "images" / "1421539896.jpg", 1)
    write_image(root / "images" / "B00002.jpg", 2)
    return {
        "1421539896/0": " jane o. doe",
        "1421539896/1": "No",
        "B00002/0": "Jane Doe",
        "B00002/1": "no ",
    }


CAPTIONS = (
    ("a dog runs on the beach", "a brown dog is running on sand"),
    ("two men play chess in a park", "old men are playing chess outside"),
    ("a red bus drives down the street", "a bus on a city street"),
)
_SAID = (
    "a dog runs on the beach",
    "two men are playing chess in a park",
    "a cat sleeps on a sofa",
)


def _karpathy_images(extra: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    images = []
    for n, (captions, more) in enumerate(zip((*CAPTIONS, CAPTIONS[0]), extra, strict=True)):
        sentences = [
            {"tokens": raw.split(), "raw": f"{raw.capitalize()}.", "imgid": n, "sentid": 9 * n + k}
            for k, raw in enumerate(captions)
        ]
        split = "test" if n < 3 else "train"
        images.append({"sentids": [], "imgid": n, "sentences": sentences, "split": split, **more})
    return images


def write_flickr30k(root: Path) -> dict[str, str]:
    names = [f"100{n}.jpg" for n in range(4)]
    images = _karpathy_images([{"filename": name} for name in names])
    write_json(root / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    for shade, name in enumerate(names):
        write_image(root / "flickr30k-images" / name, shade)
    return {f"{n}": text for n, text in enumerate(_SAID)}


def write_coco_captions(root: Path) -> dict[str, str]:
    names = [f"COCO_val2014_{391895 + n:012d}.jpg" for n in range(4)]
    images = _karpathy_images(
        [
            {"filepath": "val2014", "filename": name, "cocoid": 391895 + n}
            for n, name in enumerate(names)
        ]
    )
    write_json(root / "dataset_coco.json", {"images": images, "dataset": "coco"})
    for shade, name in enumerate(names):
        write_image(root / "val2014" / name, shade)
    return {f"{391895 + n}": text for n, text in enumerate(_SAID)}


def write_open_benchmarks(data_root: Path) -> dict[str, dict[str, str]]:
    """Write all of them under a data root; return the answers by benchmark."""
    return {
        "mme": write_mme(data_root / "MME"),
        "gqa": write_gqa(data_root / "GQA"),
        "text_vqa": write_text_vqa(data_root / "TextVQA"),
        "ok_vqa": write_ok_vqa(data_root / "OKVQA"),
        "ocr_vqa": write_ocr_vqa(data_root / "OCR-VQA"),
        "flickr30k": write_flickr30k(data_root / "Flickr30k"),
        "coco_captions": write_coco_captions(data_root / "COCO"),
    }
