import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from evaluation.official_files import write_image, write_json
from evaluation.official_files_open import (
    COGNITION_SUBTASKS,
    HUMAN_ANSWERS,
    write_gqa,
    write_json_lines,
    write_mme,
    write_mme_image,
    write_ocr_vqa,
    write_ok_vqa,
    write_text_vqa,
)

from covft.evaluation.benchmark import Benchmark, Item
from covft.evaluation.benchmarks.gqa import GQA
from covft.evaluation.benchmarks.mme import MME
from covft.evaluation.benchmarks.ocr_vqa import OCRVQA
from covft.evaluation.benchmarks.ok_vqa import OKVQA
from covft.evaluation.benchmarks.text_vqa import TextVQA
from covft.evaluation.evaluate import score_predictions
from covft.evaluation.predictions import PredictionWriter, Record, asked_digests
from covft.evaluation.vqa_answers import consensus, normalised_answer

TWO_THIRDS = pytest.approx(200 / 3)
SHORT = "\nAnswer the question using a single word or phrase."


def items_by_id(benchmark: Benchmark) -> dict[str, Item]:
    return {item.id: item for item in benchmark.items()}


def problems(benchmark: Benchmark) -> dict[str, str]:
    return {item.id: item.problem for item in benchmark.items() if item.problem is not None}


@pytest.mark.parametrize(
    ("build", "write", "expected"),
    [
        (GQA, write_gqa, TWO_THIRDS),
        (TextVQA, write_text_vqa, pytest.approx(53.3333, abs=1e-3)),
        (OKVQA, write_ok_vqa, pytest.approx(53.3333, abs=1e-3)),
        (OCRVQA, write_ocr_vqa, 75.0),
    ],
)
def test_the_worked_example_scores_what_it_should(
    build: type[Benchmark],
    write: Callable[[Path], dict[str, str]],
    expected: float,
    tmp_path: Path,
) -> None:
    answers = write(tmp_path)
    benchmark = build(root=str(tmp_path))
    assert not problems(benchmark)

    def generate(item: Item) -> str:
        assert all(benchmark.open_image(image).mode == "RGB" for image in item.images)
        return answers[item.id]

    predictions = {item.id: generate(item) for item in benchmark.items()}
    assert predictions == answers
    assert benchmark.score(predictions) == {"accuracy": expected}


@pytest.mark.parametrize("inside", ["", "MME_Benchmark"])
def test_mme_worked_example_in_both_layouts(inside: str, tmp_path: Path) -> None:
    predictions = write_mme(tmp_path, inside=inside)
    benchmark = MME(root=str(tmp_path))
    assert all(benchmark.open_image(item.images[0]) for item in benchmark.items())
    assert set(items_by_id(benchmark)) == set(predictions)
    scores = benchmark.score(predictions)
    assert scores["existence"] == pytest.approx(100.0)
    assert scores["OCR"] == scores["artwork"] == 200.0
    assert scores["perception"] == pytest.approx(1900.0)
    assert "cognition" not in scores
    units = benchmark.item_scores(predictions)
    assert [units[f"existence/00{n}"] for n in range(3)] == [1.0, 0.25, 0.25]
    assert benchmark.num_official == 2114


def test_mme_cognition_is_a_metric_of_its_own(tmp_path: Path) -> None:
    predictions = write_mme(tmp_path, cognition=True)
    predictions["code_reasoning/007/1"] = "yes"
    benchmark = MME(root=str(tmp_path))
    scores = benchmark.score(predictions)
    assert scores["perception"] == pytest.approx(1900.0)
    assert scores["cognition"] == pytest.approx(650.0)
    assert benchmark.num_official == 2374
    units = {unit.partition("/")[0] for unit in benchmark.item_scores(predictions)}
    assert units == set(benchmark.strata().values()) and not units & set(COGNITION_SUBTASKS)


def test_mme_prompts(tmp_path: Path) -> None:
    write_mme(tmp_path)
    item = items_by_id(MME(root=str(tmp_path)))["scene/007/2"]
    assert item.question == f"Is there a y in 007?{SHORT}"
    assert item.context is None and item.answer == "yes" and item.unit == "scene/007"
    assert item.images[0].endswith("scene/images/007.jpg")


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("Yes", "yes"),
        ("NO", "no"),
        ("Yes.", "yes"),
        (" No, there isn't", "no"),
        ("None", "no"),
        ("I know", "other"),
        ("The answer is yes", "other"),
        ("", "other"),
    ],
)
def test_mme_reads_the_first_four_characters(said: str, read: str) -> None:
    for answer in ("yes", "no"):
        item = Item(id="0", question="", answer=answer)
        assert MME(root="").is_correct(said, item) == (read == answer)


def test_mme_limit_takes_subtasks_in_turn_and_scales_the_sum(tmp_path: Path) -> None:
    predictions = write_mme(tmp_path, cognition=True)
    benchmark = MME(root=str(tmp_path), limit=3)
    assert [item.unit for item in benchmark.items()][::2] == [
        "existence/000",
        "count/007",
        "position/007",
    ]
    assert benchmark.score(predictions)["perception"] == pytest.approx(2000.0)
    predictions["count/007/1"] = "yes"
    scores = benchmark.score(predictions)
    assert scores["count"] == 50.0
    assert scores["perception"] == pytest.approx(1500.0)


def test_mme_broken_questions_are_listed_and_count_with_their_image(tmp_path: Path) -> None:
    predictions = write_mme(tmp_path)
    root = tmp_path / "MME_Benchmark_release_version"
    (root / "count" / "007.txt").write_text("Are there two? Please answer yes or no. Yes\nTwo?\tNo")
    write_mme_image(root / "color", "007", ("No",), nested=False)
    write_mme_image(root / "position", "007", ("No", "Yes", "No"), nested=False)
    (root / "scene" / "questions_answers_YN" / "007.txt").write_bytes(b"\xff\xfe\tYes\nb\tNo")
    (root / "scene" / "questions_answers_YN" / "._007.txt").write_bytes(b"\x00")
    benchmark = MME(root=str(tmp_path))
    found = problems(benchmark)
    assert set(found) == {
        "count/007/1",
        *("color/007/1", "color/007/2"),
        *("position/007/1", "position/007/2", "position/007/3"),
        *("scene/007/1", "scene/007/2"),
    }
    assert found["color/007/2"] == "color/007.txt, line 2: 1 questions, expected 2"
    assert "expected a question, a tab and Yes or No" in found["count/007/1"]
    assert "isn't UTF-8" in found["scene/007/1"]
    predictions |= {"position/007/3": "no", "count/007/2": "no"}
    scores = benchmark.score(predictions)
    assert scores["color"] == scores["position"] == scores["scene"] == 0.0
    assert scores["count"] == 50.0


def test_mme_missing_folders(tmp_path: Path) -> None:
    write_mme(tmp_path)
    root = tmp_path / "MME_Benchmark_release_version"
    shutil.rmtree(root / "artwork" / "images")
    benchmark = MME(root=str(tmp_path))
    assert not problems(benchmark)
    with pytest.raises(ValueError, match=r"image not found: .*artwork/images/007\.jpg"):
        benchmark.open_image(items_by_id(benchmark)["artwork/007/1"].images[0])
    shutil.rmtree(root / "OCR")
    with pytest.raises(ValueError, match=r"has no questions of OCR; data/README.md"):
        MME(root=str(tmp_path)).items()
    with pytest.raises(ValueError, match="no folder 'existence' in"):
        MME(root=str(tmp_path / "nothing")).items()


def test_mme_export_is_what_the_eval_tool_reads(tmp_path: Path) -> None:
    predictions = write_mme(tmp_path)
    predictions["existence/000/1"] = "yes\tindeed\nit is"
    root = tmp_path / "MME_Benchmark_release_version"
    (root / "existence" / "001.txt").write_text("no tab\nIs it? Please answer yes or no.\tNo")
    benchmark = MME(root=str(tmp_path))
    out = tmp_path / "out"
    paths = benchmark.export(predictions, out)
    assert sorted(path.stem for path in paths) == sorted(set(benchmark.strata().values()))
    assert (out / "existence.txt").read_text().splitlines() == [
        "000.jpg\tIs there a x in 000? Please answer yes or no.\tYes\tyes indeed it is",
        "000.jpg\tIs there a y in 000? Please answer yes or no.\tNo\tNo.",
        "002.jpg\tIs there a x in 002? Please answer yes or no.\tYes\tThe answer is yes",
        "002.jpg\tIs there a y in 002? Please answer yes or no.\tNo\tno",
    ]


def test_gqa_prompts_export_and_broken_questions(tmp_path: Path) -> None:
    predictions = write_gqa(tmp_path)
    benchmark = GQA(root=str(tmp_path))
    item = benchmark.items()[0]
    assert item.question == f"What is it, 201307251?{SHORT}"
    assert item.context is None
    assert item.images == (str(tmp_path / "images" / "n201307251.jpg"),)
    (path,) = benchmark.export(predictions, tmp_path)
    assert json.loads(path.read_text())[0] == {"questionId": "201307251", "prediction": "yes"}
    file = tmp_path / "testdev_balanced_questions.json"
    questions = json.loads(file.read_text())
    del questions["201307251"]["answer"]
    questions["201640614"] = "left"
    write_json(file, questions)
    broken = GQA(root=str(tmp_path))
    assert problems(broken) == {
        "201307251": "testdev_balanced_questions.json, '201307251': 'answer' is empty",
        "201640614": "testdev_balanced_questions.json, '201640614': no object, but 'left'",
    }
    said = {**predictions, "202225914": "Computer"}
    assert broken.score(said) == {"accuracy": pytest.approx(100 / 3)}
    assert len(broken.export(predictions, tmp_path)) == 1


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_gqa_names_a_file_that_is_something_else(content: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"testdev_balanced_questions.json not found"):
        GQA(root=str(tmp_path)).items()
    (tmp_path / "testdev_balanced_questions.json").write_text(content)
    with pytest.raises(ValueError, match=r"testdev_balanced_questions.json (is no JSON|must hold)"):
        GQA(root=str(tmp_path)).items()


def test_all_of_gqa_is_scored_in_under_five_seconds(tmp_path: Path) -> None:
    write_gqa(tmp_path)
    file = tmp_path / "testdev_balanced_questions.json"
    (template, *_) = json.loads(file.read_text()).values()
    content = {f"{20_000_000 + n}": {**template, "imageId": f"n{n % 398}"} for n in range(12578)}
    write_json(file, content)
    benchmark = GQA(root=str(tmp_path))
    asked = asked_digests(benchmark)
    path = tmp_path / "predictions" / "gqa.jsonl"
    with PredictionWriter(path, {"weights": "w"}) as writer:
        writer.add(
            [Record(key, asked[key], "Yes." if n % 2 else "no") for n, key in enumerate(asked)]
        )
    started = time.process_time()
    result = score_predictions(GQA(root=str(tmp_path)), path, expected={"weights": "w"})
    assert result.metrics == {"accuracy": 50.0} and result.num_items == 12578
    assert time.process_time() - started < 5  # of the processor: others may keep it busy


def test_text_vqa_prompts_are_matched_by_image_and_question(tmp_path: Path) -> None:
    write_text_vqa(tmp_path)
    items = items_by_id(TextVQA(root=str(tmp_path)))
    question = "What does it say?\nReference OCR token: DAKOTA, TOKEN1" + SHORT
    assert items["34603"].question == question
    assert items["34603"].context is None
    assert items["34604"].question.startswith("What is on sale?\nReference OCR token: DAKOTA, TOK")
    assert items["34602"].images == (str(tmp_path / "train_images" / "003a8ae2ef43b901.jpg"),)


def test_text_vqa_broken_rows(tmp_path: Path) -> None:
    predictions = write_text_vqa(tmp_path)
    prompts = tmp_path / "llava_textvqa_val_v051_ocr.jsonl"
    lines = prompts.read_text().splitlines()
    prompts.write_text("\n".join([lines[0], "{torn", lines[2]]))
    file = tmp_path / "TextVQA_0.5.1_val.json"
    content = json.loads(file.read_text())
    content["data"][0]["answers"] = ["dakota"] * 9
    write_json(file, content)
    benchmark = TextVQA(root=str(tmp_path))
    where = "TextVQA_0.5.1_val.json, data"
    assert problems(benchmark) == {
        "34602": f"{where} 1: 'answers' must be a list of 10, found 9 of them",
        "34603": f"{where} 2: llava_textvqa_val_v051_ocr.jsonl has no line on image "
        "4e5ae48a59d6c1e2 that asks 'what does it say?'",
    }
    assert benchmark.score({**predictions, "34604": "Tea"}) == {"accuracy": pytest.approx(100 / 3)}
    prompts.unlink()
    with pytest.raises(ValueError, match=r"llava_textvqa_val_v051_ocr.jsonl not found"):
        TextVQA(root=str(tmp_path)).items()
    write_json(file, {"rows": []})
    with pytest.raises(ValueError, match="has no list 'data' of records; found 'rows'"):
        TextVQA(root=str(tmp_path)).items()


def test_people_may_answer_anything(tmp_path: Path) -> None:
    write_text_vqa(tmp_path)
    file = tmp_path / "TextVQA_0.5.1_val.json"
    content = json.loads(file.read_text())
    content["data"][0]["answers"] = ["nan"] * 5 + [""] * 5
    write_json(file, content)
    benchmark = TextVQA(root=str(tmp_path))
    assert not problems(benchmark)
    predictions = dict.fromkeys(items_by_id(benchmark), "Nan")
    assert benchmark.item_scores(predictions)["34602"] == 1.0
    assert set(benchmark.item_scores(dict.fromkeys(predictions, "")).values()) == {0.0}


def test_vqa_exports_are_the_submissions(tmp_path: Path) -> None:
    for build, write in ((TextVQA, write_text_vqa), (OKVQA, write_ok_vqa)):
        root = tmp_path / build.name
        predictions = write(root)
        (path,) = build(root=str(root)).export(predictions, root)
        expected = [{"question_id": int(key), "answer": said} for key, said in predictions.items()]
        assert json.loads(path.read_text()) == expected


def test_ok_vqa_prompts_and_broken_annotations(tmp_path: Path) -> None:
    predictions = write_ok_vqa(tmp_path)
    item = OKVQA(root=str(tmp_path)).items()[0]
    assert item.question == f"What is it, 2971475?{SHORT}"
    assert item.context is None and item.answer == tuple(HUMAN_ANSWERS[0])
    assert item.images[0].endswith("/val2014/COCO_val2014_000000000297.jpg")
    file = tmp_path / "mscoco_val2014_annotations.json"
    content = json.loads(file.read_text())
    content["annotations"] = content["annotations"][1:]
    content["annotations"][0]["answers"] = None
    write_json(file, content)
    benchmark = OKVQA(root=str(tmp_path))
    name = "OpenEnded_mscoco_val2014_questions.json"
    assert problems(benchmark) == {
        "3397615": f"{name}, questions 2: 'answers' must be a list of 10, found None",
        "4250025": f"{name}, questions 3: mscoco_val2014_annotations.json has no question 4250025",
    }
    assert benchmark.score(predictions) == {"accuracy": pytest.approx(100 / 3)}


def test_ok_vqa_shares_images_with_coco(tmp_path: Path) -> None:
    write_ok_vqa(tmp_path / "OKVQA")
    (tmp_path / "COCO").mkdir()
    (tmp_path / "OKVQA" / "val2014").rename(tmp_path / "COCO" / "val2014")
    benchmark = OKVQA(root=str(tmp_path / "OKVQA"))
    assert benchmark.open_image(benchmark.items()[0].images[0]).mode == "RGB"


def test_ocr_vqa_prompts_images_and_broken_books(tmp_path: Path) -> None:
    predictions = write_ocr_vqa(tmp_path)
    items = items_by_id(OCRVQA(root=str(tmp_path)))
    assert items["1421539896/0"].question == f"Who wrote this book?{SHORT}"
    assert items["B00002/0"].images == (str(tmp_path / "images" / "B00002.jpg"),)
    write_image(tmp_path / "images" / "B00002.gif", 3)
    again = items_by_id(OCRVQA(root=str(tmp_path)))
    assert again["B00002/0"].images == (str(tmp_path / "images" / "B00002.gif"),)
    file = tmp_path / "dataset.json"
    content = json.loads(file.read_text())
    content["0761183272"]["split"] = "test"
    content["1421539896"]["answers"] = ["Jane O. Doe"]
    content["B00002"]["questions"][0] = None
    content["B00003"] = None
    write_json(file, content)
    broken = OCRVQA(root=str(tmp_path))
    assert problems(broken) == {
        "0761183272": "dataset.json, '0761183272': 'split' must be 1, 2 or 3, found 'test'",
        "1421539896": "dataset.json, '1421539896': 'questions' and 'answers' must be lists of the "
        "same length",
        "B00002/0": "dataset.json, 'B00002', question 1: 'question' or 'answer' is empty",
        "B00003": "dataset.json, 'B00003': no object, but None",
    }
    said = {**dict.fromkeys(problems(broken), "no"), "B00002/1": predictions["B00002/1"]}
    assert broken.score(said) == {"accuracy": 20.0}
    write_json(file, {"1": {**content["B00002"], "split": 1}})
    with pytest.raises(ValueError, match="no record of the test split"):
        OCRVQA(root=str(tmp_path)).items()


@pytest.mark.parametrize(
    ("said", "normalised"),
    [
        ("The Two Dogs", "2 dogs"),
        ("none", "0"),
        ("a.b.c.", "abc"),
        ("3.5", "3.5"),
        ("5.", "5"),
        ("1,000", "1000"),
        ("t-shirt", "t shirt"),
        ("yes - no", "yes no"),
        ("half-and-half - yes", "halfandhalf yes"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("Levi's", "levi 's"),
        ("it's", "it 's"),
        ("what?\n\tnew", "what new"),
        ("the", ""),
    ],
)
def test_answers_are_normalised_with_upstreams_quirks(said: str, normalised: str) -> None:
    assert normalised_answer(said) == normalised


@pytest.mark.parametrize(
    ("num_same", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_consensus_leaves_each_person_out_in_turn(num_same: int, expected: float) -> None:
    answers = ["Red."] * num_same + [f"blue {n}" for n in range(10 - num_same)]
    assert consensus("a red", answers) == pytest.approx(expected)
    item = Item(id="0", question="", answer=tuple(answers))
    assert TextVQA(root="").is_correct("red", item) == (num_same > 0)


def test_json_lines_of_prompts_may_repeat_questions_of_other_images(tmp_path: Path) -> None:
    write_text_vqa(tmp_path)
    file = tmp_path / "llava_textvqa_val_v051_ocr.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    other = {**rows[0], "question_id": "other", "text": rows[0]["text"].replace("TOKEN", "OTHER")}
    write_json_lines(file, [other, *rows])
    items = items_by_id(TextVQA(root=str(tmp_path)))
    assert "TOKEN2" in items["34604"].question
