"""What every registered benchmark keeps to, on miniature official files."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluation.official_files import (
    write_ai2d,
    write_cv_bench,
    write_icon_qa,
    write_mmbench,
    write_mmvp,
    write_real_world_qa,
    write_science_qa,
)
from evaluation.official_files_open import (
    write_coco_captions,
    write_flickr30k,
    write_gqa,
    write_mme,
    write_ocr_vqa,
    write_ok_vqa,
    write_text_vqa,
)
from quickstart_miniature import write_easy_vqa

from covft.evaluation.benchmark import Benchmark
from covft.evaluation.benchmarks import named_benchmarks
from covft.evaluation.check_data import check_data
from covft.evaluation.significance import compare_scores
from covft.registry import BENCHMARKS

WRITERS: dict[str, Callable[[Path], Any]] = {
    "mme": lambda root: write_mme(root, cognition=True),
    "mmbench_en": write_mmbench,
    "mmbench_cn": lambda root: write_mmbench(root, "cn"),
    "gqa": write_gqa,
    "science_qa": write_science_qa,
    "ai2d": write_ai2d,
    "text_vqa": write_text_vqa,
    "mmvp": write_mmvp,
    "real_world_qa": write_real_world_qa,
    "cvbench_coco": write_cv_bench,
    "cvbench_ade": write_cv_bench,
    "cvbench_omni3d": write_cv_bench,
    "flickr30k": write_flickr30k,
    "coco_captions": write_coco_captions,
    "icon_qa": write_icon_qa,
    "ok_vqa": write_ok_vqa,
    "ocr_vqa": write_ocr_vqa,
    "easy_vqa": write_easy_vqa,
}
#: What a benchmark's scores or files need, installed with the extra "eval".
NEEDS = {
    **dict.fromkeys(("ai2d", "real_world_qa"), "pyarrow"),
    **dict.fromkeys(("cvbench_coco", "cvbench_ade", "cvbench_omni3d"), "pyarrow"),
    **dict.fromkeys(("mmbench_en", "mmbench_cn"), "openpyxl"),
    **dict.fromkeys(("flickr30k", "coco_captions"), "pycocoevalcap"),
}


@pytest.fixture(autouse=True)
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting it takes seconds, and other tests do."""
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.fixture(params=WRITERS)
def name(request: pytest.FixtureRequest) -> str:
    if request.param in NEEDS:
        pytest.importorskip(NEEDS[request.param])
    return request.param


def build(name: str, root: Path, *, limit: int | None = None) -> Benchmark:
    (config,) = named_benchmarks([name])
    return BENCHMARKS.build({**config, "root": str(root), "limit": limit})


def some_answers(benchmark: Benchmark, *, every: int) -> dict[str, str]:
    """Return the reference's own words for every so many items, and wrong ones for the others."""
    answers = {}
    for number, item in enumerate(benchmark.items()):
        right = item.answer if isinstance(item.answer, str) else item.answer[0]
        answers[item.id] = right if number % every == 0 else "something else"
    return answers


def test_every_registered_benchmark_is_held_to_it() -> None:
    ours = {
        kind
        for kind in BENCHMARKS.module_dict.values()
        if kind.__module__.startswith("covft.evaluation.benchmarks")
    }
    tested = {BENCHMARKS.get(named_benchmarks([name])[0]["type"]) for name in WRITERS}
    assert ours == tested


def test_names_titles_and_folders_are_unique(tmp_path: Path) -> None:
    for name, write in WRITERS.items():
        if name == "easy_vqa":  # looks for its files when it is built
            write(tmp_path)
    benchmarks = [build(name, tmp_path) for name in WRITERS]
    assert [benchmark.name for benchmark in benchmarks] == list(WRITERS)
    assert len({benchmark.title for benchmark in benchmarks}) == len(benchmarks)
    assert len({b.folder for b in benchmarks}) == len({type(b) for b in benchmarks})
    for benchmark in benchmarks:
        official = benchmark.num_official
        assert official is None or official > 100
        assert 8 <= benchmark.max_new_tokens <= 1024


def test_items(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    benchmark = build(name, tmp_path)
    items = benchmark.items()
    assert len({item.id for item in items}) == len(items) > 0
    for item in items:
        assert item.problem is None
        assert item.answer and item.question == item.question.strip()
        for text in (item.question, item.context or ""):
            assert "<image>" not in text
        for image in item.images:
            assert benchmark.open_image(image).mode == "RGB"
    assert any(item.images for item in items)
    report = check_data(benchmark)
    assert report.error is None and not report.missing and not report.problems
    assert [item.id for item in build(name, tmp_path).items()] == [item.id for item in items]


def test_a_limit_keeps_whole_units(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    whole = build(name, tmp_path).items()
    units = list(dict.fromkeys(item.unit for item in whole))
    limited = build(name, tmp_path, limit=2)
    expected = [item.id for item in whole if item.unit in units[:2]]
    assert [item.id for item in limited.items()] == expected
    assert limited.metric in limited.score(some_answers(limited, every=1))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_headline_is_the_mean_of_the_units_over_parts(
    name: str, every: int, tmp_path: Path
) -> None:
    WRITERS[name](tmp_path)
    benchmark = build(name, tmp_path)
    predictions = some_answers(benchmark, every=every)
    scores = benchmark.score(predictions)
    units = benchmark.item_scores(predictions)
    assert set(units) <= {item.unit for item in benchmark.items()}
    strata = benchmark.strata()
    assert set(strata) <= set(units)
    parts: dict[str, list[float]] = {}
    for unit, score in units.items():
        parts.setdefault(strata.get(unit, ""), []).append(score)
    means = [sum(found) / len(found) for found in parts.values()]
    expected = benchmark.max_score * sum(means) / len(means)
    assert scores[benchmark.metric] == pytest.approx(expected)
    if every == 1 and benchmark.metric != "cider":  # whose maximum isn't 1
        assert scores[benchmark.metric] > 0.2 * benchmark.max_score
        assert all(0 <= score <= 1 for score in units.values())


def test_differences_of_runs_are_those_of_the_headline(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    benchmark = build(name, tmp_path)
    one, two = (some_answers(benchmark, every=every) for every in (1, 2))
    found = compare_scores(
        benchmark.item_scores(one),
        benchmark.item_scores(two),
        strata=benchmark.strata(),
        max_score=benchmark.max_score,
        num_draws=10,
    )
    difference = benchmark.score(two)[benchmark.metric] - benchmark.score(one)[benchmark.metric]
    assert found.difference == pytest.approx(difference)


def test_empty_answers_score_nothing(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    benchmark = build(name, tmp_path)
    for text in ("", " \n"):
        predictions = dict.fromkeys((item.id for item in benchmark.items()), text)
        assert set(benchmark.item_scores(predictions).values()) == {0.0}
        assert set(benchmark.score(predictions).values()) == {0.0}
        assert not any(benchmark.is_correct(text, item) for item in benchmark.items())
    with pytest.raises(ValueError, match="have no prediction"):
        benchmark.score({})


def test_exports(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / "data")
    benchmark = build(name, tmp_path / "data")
    answers = some_answers(benchmark, every=2)
    answers[benchmark.items()[0].id] = ""
    out = tmp_path / "out"
    out.mkdir()
    paths = benchmark.export(answers, out)
    assert sorted(paths) == sorted(out.iterdir())
    assert all(path.stat().st_size for path in paths)
    assert all(isinstance(value, str) for value in benchmark.notes().values())
