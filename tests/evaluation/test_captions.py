import json
import shutil
import sys
from pathlib import Path

import pytest
from evaluation.official_files import write_json
from evaluation.official_files_open import write_coco_captions, write_flickr30k

from covft.evaluation import caption_metrics
from covft.evaluation.benchmarks.captions import COCOCaptions, Flickr30k, KarpathyCaptions
from covft.evaluation.caption_metrics import PTB, REGEX, CaptionScorer, ptb_words, regex_words
from covft.evaluation.check_data import check_data
from covft.evaluation.chosen import Chosen, check_files
from covft.evaluation.gallery import Answers, write_gallery

JAVA = shutil.which("java")
BENCHMARKS = [(Flickr30k, write_flickr30k), (COCOCaptions, write_coco_captions)]


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)


def check_worked_example(benchmark: KarpathyCaptions, answers: dict[str, str]) -> None:
    for item in benchmark.items():
        assert item.question == "Provide a one-sentence caption for the provided image."
        assert item.context is None
        assert benchmark.open_image(item.images[0]).mode == "RGB"
    predictions = {item.id: answers[item.id] for item in benchmark.items()}
    assert len(predictions) == 3
    scores = benchmark.score(predictions)
    expected = {"cider": 340.0393, "bleu_1": 85.0, "bleu_4": 64.1008, "rouge_l": 76.9912}
    assert {key: scores[key] for key in expected} == pytest.approx(expected, abs=1e-4)
    assert list(scores) == ["cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"]
    units = benchmark.item_scores(predictions)
    assert scores["cider"] == pytest.approx(100 * sum(units.values()) / 3)
    nothing = benchmark.score(dict.fromkeys(predictions, ""))
    assert nothing == pytest.approx(dict.fromkeys(scores, 0.0))


@pytest.mark.parametrize(("build", "write"), BENCHMARKS)
@pytest.mark.usefixtures("no_java")
def test_the_worked_example_without_java(build, write, tmp_path: Path, caplog) -> None:
    pytest.importorskip("pycocoevalcap")
    answers = write(tmp_path)
    benchmark = build(root=str(tmp_path))
    check_worked_example(benchmark, answers)
    assert benchmark.notes() == {"tokenizer": REGEX}


@pytest.mark.skipif(JAVA is None, reason="needs Java")
def test_the_worked_example_with_java(tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    answers = write_coco_captions(tmp_path)
    benchmark = COCOCaptions(root=str(tmp_path))
    check_worked_example(benchmark, answers)
    assert benchmark.notes() == {"tokenizer": PTB}


SAME_WORDS = {
    "": "",
    "A man (left) isn't riding the dog's bike; it's 3:30 p.m.!": (
        "a man -lrb- left -rrb- is n't riding the dog 's bike it 's 3:30 p.m."
    ),
    'Two cafés – "hello" … 1/2 of the T-shirt & colour, 1,000 cannot run.': (
        "two cafés hello 1/2 of the t-shirt & colour 1,000 can not run"
    ),
    "the kids' U.S. flag... o'clock": "the kids u.s. flag o'clock",
    "An   odd\u2028line\x0bbreak\r\nhere .": "an odd line break here",
    "Mr. Smith’s black-and-white photo -- of a man/woman": (
        "mr. smith 's black-and-white photo of a man/woman"
    ),
    "50% off of $3.99 at #5": "50 % off of $ 3.99 at # 5",
}


def test_words_without_java() -> None:
    assert regex_words(list(SAME_WORDS)) == list(SAME_WORDS.values())


@pytest.mark.skipif(JAVA is None, reason="needs Java")
def test_words_with_java() -> None:
    pytest.importorskip("pycocoevalcap")
    assert JAVA is not None
    assert ptb_words(list(SAME_WORDS), java=JAVA) == list(SAME_WORDS.values())
    assert ptb_words([], java=JAVA) == []


@pytest.mark.parametrize("program", ["exit 3", "echo one line", "echo Get Java! >&2; exit 1"])
def test_a_java_that_does_not_work_is_done_without(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pycocoevalcap")
    java = tmp_path / "java"
    java.write_text(f"#!/bin/sh\n{program}\n")
    java.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(java))
    said = []
    monkeypatch.setattr(caption_metrics, "print_log", lambda text, **kwargs: said.append(text))
    assert CaptionScorer([["a dog", "the dog"], ["a cat"]]).tokenizer == REGEX
    assert "exited with" in said[0] and PTB in said[0]


@pytest.mark.usefixtures("no_java")
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(ImportError, match=r"pip install -e '.\[eval\]'"):
        CaptionScorer([["a dog"]])


def test_a_missing_library_is_noticed_before_inference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    write_flickr30k(tmp_path)
    benchmark = Flickr30k(root=str(tmp_path))
    assert "needs pycocoevalcap" in str(check_data(benchmark))
    with pytest.raises(ValueError, match="flickr30k: scoring captions needs pycocoevalcap"):
        check_files([Chosen({}, benchmark)], scored=True)
    check_files([Chosen({}, benchmark)], scored=False)  # answers can be scored elsewhere


def test_a_gallery_of_captions_has_the_lowest_scores_first(tmp_path: Path) -> None:
    write_flickr30k(tmp_path)
    benchmark = Flickr30k(root=str(tmp_path))
    ids = [item.id for item in benchmark.items()]
    scores = dict(zip(ids, (3.5, 0.25, 1.0), strict=True))
    answers = Answers("run", dict.fromkeys(ids, "a dog"), scores)
    assert write_gallery(tmp_path / "g.html", benchmark, [answers], max_units=2) == 2
    page = (tmp_path / "g.html").read_text()
    assert "The 2 lowest scores of 3, the lowest first." in page
    assert page.index("score 0.25") < page.index("score 1.00")
    assert "score 3.50" not in page and 'class="wrong"' not in page and "are wrong" not in page


@pytest.mark.usefixtures("no_java")
def test_broken_images_count_nothing(tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    answers = write_coco_captions(tmp_path)
    whole = COCOCaptions(root=str(tmp_path)).score(answers)
    file = tmp_path / "dataset_coco.json"
    content = json.loads(file.read_text())
    broken = {**content["images"][0], "cocoid": 7, "sentences": []}
    nameless = {key: value for key, value in broken.items() if key != "cocoid"}
    content["images"] += [broken, nameless, "image"]
    write_json(file, content)
    benchmark = COCOCaptions(root=str(tmp_path))
    found = {item.id: item.problem for item in benchmark.items() if item.problem is not None}
    assert list(found) == ["7", *(f"(dataset_coco.json, images {n})" for n in (6, 7))]
    six, seven = list(found.values())[1:]
    assert found["7"] == "dataset_coco.json, images 5: 'sentences' holds no caption"
    assert six == "dataset_coco.json, images 6: 'cocoid' is empty"
    assert seven == "dataset_coco.json, images 7: no object, but 'image'"
    predictions = {**answers, **dict.fromkeys(found, "a dog")}
    scores = benchmark.score(predictions)
    assert scores["cider"] == pytest.approx(whole["cider"] / 2)
    assert scores["rouge_l"] == pytest.approx(whole["rouge_l"] / 2)
    assert scores["bleu_4"] == pytest.approx(whole["bleu_4"])
    units = benchmark.item_scores(predictions)
    assert scores["cider"] == pytest.approx(100 * sum(units.values()) / 6)
    write_json(file, {"images": [broken, "image"], "dataset": "coco"})
    nothing = COCOCaptions(root=str(tmp_path))
    assert nothing.score(dict.fromkeys((i.id for i in nothing.items()), "a dog")) == {"cider": 0.0}


@pytest.mark.usefixtures("no_java")
def test_export_is_a_result_file_of_coco(tmp_path: Path) -> None:
    answers = write_coco_captions(tmp_path)
    benchmark = COCOCaptions(root=str(tmp_path), limit=2)
    (path,) = benchmark.export(answers, tmp_path / "out")
    assert path.name == "captions_coco_captions_results.json"
    assert json.loads(path.read_text()) == [
        {"image_id": 391895, "caption": "a dog runs on the beach"},
        {"image_id": 391896, "caption": "two men are playing chess in a park"},
    ]


def test_a_caption_is_right_if_it_is_a_reference(tmp_path: Path) -> None:
    write_flickr30k(tmp_path)
    benchmark = Flickr30k(root=str(tmp_path))
    item = benchmark.items()[0]
    assert benchmark.is_correct("A dog  runs on the beach", item)
    assert not benchmark.is_correct("A dog runs", item)
    assert not benchmark.is_correct("", item)


def test_files_of_another_format_are_named(tmp_path: Path) -> None:
    write_flickr30k(tmp_path)
    file = tmp_path / "dataset_flickr30k.json"
    content = json.loads(file.read_text())
    write_json(file, {"images": content["images"][3:]})
    with pytest.raises(ValueError, match="has no image of the split 'test'"):
        Flickr30k(root=str(tmp_path)).items()
    file.unlink()
    with pytest.raises(ValueError, match=r"dataset_flickr30k.json not found; data/README.md"):
        Flickr30k(root=str(tmp_path)).items()
