import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluation.official_files import (
    MMBENCH_COLUMNS,
    cv_bench_row,
    hf_image,
    mmbench_row,
    write_ai2d,
    write_cv_bench,
    write_icon_qa,
    write_json,
    write_mmbench,
    write_mmvp,
    write_parquet,
    write_real_world_qa,
    write_science_qa,
    write_tsv,
)

from covft.checkpoints import build_model
from covft.config import load_config, stage_configs
from covft.datasets import InputSpec
from covft.evaluation import Benchmark, Item
from covft.evaluation.benchmarks.ai2d import AI2D
from covft.evaluation.benchmarks.cv_bench import CVBench
from covft.evaluation.benchmarks.icon_qa import IconQA
from covft.evaluation.benchmarks.mmbench import MMBench
from covft.evaluation.benchmarks.mmvp import MMVP
from covft.evaluation.benchmarks.real_world_qa import RealWorldQA
from covft.evaluation.benchmarks.science_qa import ScienceQA
from covft.evaluation.check_data import check_data
from covft.evaluation.evaluate import evaluate
from covft.registry import BENCHMARKS

TWO_THIRDS = pytest.approx(200 / 3)
LETTER = "\nAnswer with the option's letter from the given choices directly."
BUILDERS: dict[str, tuple[type[Benchmark], dict[str, str]]] = {
    "mmbench_en": (MMBench, {"lang": "en"}),
    "mmbench_cn": (MMBench, {"lang": "cn"}),
    "science_qa": (ScienceQA, {}),
    "ai2d": (AI2D, {}),
    "mmvp": (MMVP, {}),
    "real_world_qa": (RealWorldQA, {}),
    "cvbench_coco": (CVBench, {"source": "COCO"}),
    "cvbench_ade": (CVBench, {"source": "ADE20K"}),
    "cvbench_omni3d": (CVBench, {"source": "Omni3D"}),
    "icon_qa": (IconQA, {}),
}
SCORES: dict[str, dict[str, Any]] = {
    "science_qa": {"accuracy_img": TWO_THIRDS, "accuracy_all": 75.0},
    "mmvp": {"accuracy": pytest.approx(100 / 3), "accuracy_single": TWO_THIRDS},
}
WRITERS: dict[str, Callable[[Path], dict[str, str]]] = {
    "mmbench_en": write_mmbench,
    "mmbench_cn": lambda root: write_mmbench(root, "cn"),
    "science_qa": write_science_qa,
    "ai2d": write_ai2d,
    "mmvp": write_mmvp,
    "real_world_qa": write_real_world_qa,
    "cvbench_coco": lambda root: write_cv_bench(root)["COCO"],
    "cvbench_ade": lambda root: write_cv_bench(root)["ADE20K"],
    "cvbench_omni3d": lambda root: write_cv_bench(root)["Omni3D"],
    "icon_qa": write_icon_qa,
}


def example(name: str, root: Path, *, limit: int | None = None) -> tuple[Benchmark, dict[str, str]]:
    """Return a benchmark built as configs do, and the answers of its worked example."""
    if name in ("ai2d", "real_world_qa") or name.startswith("cvbench"):
        pytest.importorskip("pyarrow")
    kind, arguments = BUILDERS[name]
    answers = WRITERS[name](root)
    config = {"type": kind.__name__, "root": str(root), "limit": limit, **arguments}
    return BENCHMARKS.build(config), answers


def items_by_id(benchmark: Benchmark) -> dict[str, Item]:
    return {item.id: item for item in benchmark.items()}


def problems(benchmark: Benchmark) -> dict[str, str]:
    return {item.id: item.problem for item in benchmark.items() if item.problem is not None}


@pytest.mark.parametrize("name", BUILDERS)
def test_the_worked_example_scores_what_it_should(name: str, tmp_path: Path) -> None:
    benchmark, answers = example(name, tmp_path)
    assert benchmark.name == name
    assert not problems(benchmark)

    def generate(item: Item) -> str:
        assert all(benchmark.open_image(image).mode == "RGB" for image in item.images)
        return answers[item.id]

    predictions = {item.id: generate(item) for item in benchmark.items()}
    assert predictions.keys() == answers.keys()
    assert benchmark.score(predictions) == SCORES.get(name, {"accuracy": TWO_THIRDS})
    units = benchmark.item_scores(predictions).values()
    mean = benchmark.max_score * sum(units) / len(units)
    assert benchmark.score(predictions)[benchmark.metric] == pytest.approx(mean)
    nothing = dict.fromkeys(predictions, "")
    assert set(benchmark.score(nothing).values()) == {0.0}


@pytest.mark.parametrize("name", BUILDERS)
def test_a_limited_benchmark_has_its_headline(name: str, tmp_path: Path) -> None:
    benchmark, _ = example(name, tmp_path, limit=1)
    assert len({item.unit for item in benchmark.items()}) == 1
    assert benchmark.items()[0].images
    right = {item.id: str(item.answer) for item in benchmark.items()}
    assert benchmark.score(right)[benchmark.metric] == 100.0


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("mmbench_en", (1024, 4377)),
        ("mmbench_cn", (1024, 4329)),
        ("science_qa", (1024, 4241)),
        ("ai2d", (512, 3088)),
        ("mmvp", (512, 300)),
        ("real_world_qa", (512, 765)),
        ("cvbench_coco", (512, 805)),
        ("cvbench_ade", (512, 633)),
        ("cvbench_omni3d", (512, 1200)),
        ("icon_qa", (512, 6316)),
    ],
)
def test_lengths_and_official_numbers(name: str, limits: tuple[int, int]) -> None:
    kind, arguments = BUILDERS[name]
    benchmark = kind(root="", **arguments)
    assert (benchmark.max_new_tokens, benchmark.num_official) == limits


def test_mmbench_prompts(tmp_path: Path) -> None:
    write_mmbench(tmp_path)
    write_mmbench(tmp_path, "cn")
    items = items_by_id(MMBench(root=str(tmp_path)))
    context = "It purrs.\nWhich animal is it?\nA. dog\nB. cat"
    assert items["1000001"].question == context + LETTER
    assert items["1000001"].context == context
    assert items["3"].context == 'A "question"\nof two lines?\nA. dog\nB. tree'
    assert items["2000002"].unit == items["2"].unit != items["1"].unit
    chinese = items_by_id(MMBench(root=str(tmp_path), lang="cn"))
    assert chinese["1000001"].question == context + "\n请直接回答选项字母。"
    with pytest.raises(ValueError, match="lang must be en or cn, got 'de'"):
        MMBench(root=str(tmp_path), lang="de")


def test_mmbench_rotations_share_an_image(tmp_path: Path) -> None:
    write_mmbench(tmp_path)
    benchmark = MMBench(root=str(tmp_path))
    names = {item.id: item.images for item in benchmark.items()}
    assert names["1"] == names["1000001"] == ("1",)  # an index
    assert names["2"] == names["1000002"] == names["2000002"] == ("2",)  # the same base64
    assert benchmark.open_image("2").getpixel((0, 0)) == (2, 40, 80)


def test_mmbench_counts_a_question_only_if_all_rotations_are_right(tmp_path: Path) -> None:
    write_mmbench(tmp_path)
    benchmark = MMBench(root=str(tmp_path))
    right = {item.id: item.answer for item in benchmark.items()}
    assert benchmark.score(right) == {"accuracy": 100.0}
    assert benchmark.score({**right, "2000002": ""}) == {"accuracy": TWO_THIRDS}
    assert benchmark.item_scores({**right, "2000002": "A"}) == {"1": 1.0, "2": 0.0, "3": 1.0}


def test_mmbench_lists_broken_rows_and_counts_them_with_their_question(tmp_path: Path) -> None:
    rows = [
        mmbench_row(1, "cat,None", "B"),
        mmbench_row(2, "cat,nan,nan,nan", "A", hint="nan"),
        mmbench_row(3, "cat,,cow", "A"),
        mmbench_row(4, "cat,dog", "C"),
        mmbench_row(5, ",,", "A"),
        mmbench_row(6, "cat,dog", "A"),
        mmbench_row(1000006, "dog,cat", "B", image="77"),
        mmbench_row(7, "cat,dog", "A", image="%%% broken base64 %%%"),
        mmbench_row(8, "cat,dog", "A", image=""),
        mmbench_row(9, "NA,no", "A", hint="None"),
    ]
    write_tsv(tmp_path / "mmbench_dev_20230712.tsv", rows, MMBENCH_COLUMNS)
    benchmark = MMBench(root=str(tmp_path))
    items = items_by_id(benchmark)
    assert items["1"].context == "Which animal is it?\nA. cat\nB. None"
    assert items["2"].context == "Which animal is it?\nA. cat"
    assert items["9"].context == "Which animal is it?\nA. NA\nB. no"
    file = "mmbench_dev_20230712.tsv"
    assert problems(benchmark) == {
        "3": f"{file}, row 3: options must be filled from A on, found A, C",
        "4": f"{file}, row 4: 'answer' is 'C', but there are 2 options from A on",
        "5": f"{file}, row 5: options must be filled from A on, found none",
        "1000006": f"{file}, row 7: 'image' refers to index 77, which has no image",
        "8": f"{file}, row 9: 'image' is empty",
    }
    with pytest.raises(ValueError, match="index 7: the image's base64 is broken"):
        benchmark.open_image("7")
    said = {item.id: str(item.answer) for item in benchmark.items()}
    scores = benchmark.item_scores(said)
    assert scores.pop("7") == 1.0  # what can't be opened gets no answer but an empty one
    assert {unit for unit, score in scores.items() if score} == {"1", "2", "9"}
    assert len(scores) == 8


def test_mmbench_names_the_columns_it_misses(tmp_path: Path) -> None:
    columns = ["hints" if column == "hint" else column for column in MMBENCH_COLUMNS]
    row = {**mmbench_row(1, "cat,dog", "A"), "hints": ""}
    write_tsv(tmp_path / "mmbench_dev_20230712.tsv", [row], columns)
    with pytest.raises(
        ValueError, match=r"no column 'hint'; expected index, .*; found index, .*hints"
    ):
        MMBench(root=str(tmp_path)).items()
    with pytest.raises(ValueError, match=r"mmbench_dev_cn_20231003.tsv not found"):
        MMBench(root=str(tmp_path), lang="cn").items()


def test_mmbench_export_is_the_submission(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    predictions = write_mmbench(tmp_path)
    benchmark = MMBench(root=str(tmp_path), limit=2)
    predictions["2"] = "=1+1\x07"
    (path,) = benchmark.export(predictions, tmp_path / "out")
    rows = list(openpyxl.load_workbook(path).active.iter_rows(values_only=True))
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer")
    assert rows[1] == (1, "Which animal is it?", "cat", "dog", None, None, "A", "A")
    assert rows[2] == (2, "Which animal is it?", "cat", "dog", "cow", None, "=1+1", "B")
    assert [row[0] for row in rows[1:]] == [1, 2, 1000001, 1000002, 2000002]
    assert openpyxl.load_workbook(path).active["G3"].data_type == "s"


def test_science_qa_prompts_and_order(tmp_path: Path) -> None:
    write_science_qa(tmp_path)
    benchmark = ScienceQA(root=str(tmp_path))
    assert [item.id for item in benchmark.items()] == ["5", "11", "12", "4"]
    items = items_by_id(benchmark)
    context = "Context: Plants are green.\nWhat is it?\nA. root\nB. leaf"
    assert items["5"].context == context
    assert items["5"].question == context + LETTER
    assert benchmark.item_scores(dict.fromkeys(items, "B")) == {"5": 0.0, "11": 1.0, "12": 1.0}
    assert items["4"].images == () and items["4"].context == "What is it?\nA. root\nB. leaf"
    assert items["5"].images[0].endswith("images/test/5/image.png")


def test_science_qa_lists_broken_problems(tmp_path: Path) -> None:
    predictions = write_science_qa(tmp_path)
    broken = json.loads((tmp_path / "problems.json").read_text())
    broken["5"]["answer"] = 2
    del broken["4"]
    write_json(tmp_path / "problems.json", broken)
    benchmark = ScienceQA(root=str(tmp_path))
    assert problems(benchmark) == {
        "4": "problems.json, problem 4: not there",
        "5": "problems.json, problem 5: 'answer' is 2, but there are 2 choices from 0 on",
    }
    assert benchmark.score(predictions) == {
        "accuracy_img": pytest.approx(100 / 3),
        "accuracy_all": 25.0,
    }
    write_json(tmp_path / "pid_splits.json", {"test": []})
    with pytest.raises(ValueError, match="no question of the test split has an image"):
        ScienceQA(root=str(tmp_path)).items()
    write_json(tmp_path / "pid_splits.json", ["5"])
    with pytest.raises(ValueError, match=r"pid_splits.json has no list 'test'"):
        ScienceQA(root=str(tmp_path)).items()


def test_mmvp_prompts_and_pairs(tmp_path: Path) -> None:
    write_mmvp(tmp_path)
    benchmark = MMVP(root=str(tmp_path))
    items = items_by_id(benchmark)
    context = "Are the wings, open or closed? Options:\nA. Open\nB. Closed"
    assert items["3"].context == context
    assert items["3"].question == context + LETTER
    assert items["3"].images == (str(tmp_path / "MMVP Images" / "3.jpg"),)
    assert [item.unit for item in benchmark.items()] == [f"pair {n}" for n in (1, 1, 2, 2, 3, 3)]


def test_mmvp_lists_broken_rows_and_counts_them_with_their_pair(tmp_path: Path) -> None:
    predictions = write_mmvp(tmp_path)
    path = tmp_path / "Questions.csv"
    path.write_text(path.read_text().replace('closed?",(a) Open (b) Closed,(b)', 'c?",Open,(b)', 1))
    benchmark = MMVP(root=str(tmp_path))
    says = "Questions.csv, row 2: 'Options' must read '(a) ... (b) ...', found 'Open'"
    assert problems(benchmark) == {"2": says}
    assert benchmark.score(predictions) == {"accuracy": 0.0, "accuracy_single": 50.0}


def test_ai2d_context_keeps_the_instruction(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    write_ai2d(tmp_path)
    item = AI2D(root=str(tmp_path)).items()[0]
    assert item.question == "Stage 0?\nA. egg\nB. larva\nC. pupa\nD. adult" + LETTER
    assert item.context == item.question


def test_ai2d_lists_broken_rows(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    rows = [
        {"question": "a?", "options": ["x", "y"], "answer": "2", "image": hf_image(0)},
        {"question": "b?", "options": ["x", None], "answer": "0", "image": hf_image(1)},
        {"question": "c?", "options": [], "answer": "0", "image": hf_image(2)},
        {"question": "d?", "options": ["x", "y"], "answer": "A", "image": hf_image(3)},
        {"question": None, "options": ["x", "y"], "answer": "1", "image": hf_image(4)},
        {"question": "f?", "options": ["x", "None"], "answer": "1", "image": hf_image(5)},
    ]
    write_parquet(tmp_path / "test.parquet", rows)
    benchmark = AI2D(root=str(tmp_path))
    assert list(problems(benchmark)) == ["0", "1", "2", "3", "4"]
    answers = {item.id: "B" for item in benchmark.items()}
    assert benchmark.score(answers) == {"accuracy": pytest.approx(100 / 6)}


def test_real_world_qa_asks_the_question_as_it_is(tmp_path: Path) -> None:
    first = example("real_world_qa", tmp_path)[0].items()[0]
    assert first.question.startswith("Which way?\nA. Left\nB. Right\nPlease answer directly")
    assert first.context is None


@pytest.mark.parametrize(
    ("said", "is_right"),
    [
        ("Yes", True),
        ("yes.", True),
        ("YES it is.", True),
        ("The answer is yes", True),
        ("Yes, it is", False),  # its first word is "yes,"
        ("It is yes", False),
        ("", False),
        (".", False),
        ("The answer is ", False),
    ],
)
def test_real_world_qa_compares_the_first_word(said: str, is_right: bool) -> None:
    item = Item(id="0", question="", answer="Yes")
    assert RealWorldQA(root="").is_correct(said, item) == is_right


def test_cv_bench_prompts_and_contexts(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    write_cv_bench(tmp_path)
    coco = items_by_id(CVBench(root=str(tmp_path), source="COCO"))
    prompt = "Where is the cup? Select from the following choices."
    prompt += "\n(A) right\n(B) left\n(C) above\n(D) below"
    assert list(coco) == ["1", "2", "5"]
    assert coco["5"].question == prompt + LETTER
    assert coco["5"].context == prompt
    omni = items_by_id(CVBench(root=str(tmp_path), source="Omni3D"))
    closer = "Which object is closer to the table, the bin or the chair?"
    estimate = "Estimate the real-world distances between objects in this image."
    assert omni["1440"].question == (f"{estimate} {closer}\n(A) bin\n(B) chair{LETTER}")
    assert omni["1440"].context == closer + LETTER
    rows = [cv_bench_row(7, "Omni3D_x", "(A)", ["bin", "chair"], closer, f"{estimate}\n")]
    write_parquet(tmp_path / "test_3d.parquet", rows)
    (item,) = CVBench(root=str(tmp_path), source="Omni3D").items()
    assert item.context == closer + LETTER  # without a blank line
    with pytest.raises(ValueError, match="source must be COCO, ADE20K, Omni3D, got 'ADE'"):
        CVBench(root=str(tmp_path), source="ADE")


def test_cv_bench_lists_rows_without_a_source_and_refuses_a_file_of_others(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    rows = [cv_bench_row(n, "COCO", "(A)", ["x", "y"], "q?") for n in range(2)]
    rows[1]["source"] = None
    write_parquet(tmp_path / "test_2d.parquet", rows)
    says = {"1": "test_2d.parquet, row 2: 'source' is empty"}
    assert problems(CVBench(root=str(tmp_path), source="COCO")) == says
    with pytest.raises(ValueError, match=r"no row of source ADE20K; found .*COCO"):
        CVBench(root=str(tmp_path), source="ADE20K").items()


def test_icon_qa_prompts_and_broken_questions(tmp_path: Path) -> None:
    predictions = write_icon_qa(tmp_path)
    folder = tmp_path / "test" / "choose_txt"
    benchmark = IconQA(root=str(tmp_path))
    assert [item.id for item in benchmark.items()] == ["9", "10", "102"]
    assert benchmark.items()[0].question == "What has been done?\nA. circle\nB. square" + LETTER
    assert benchmark.items()[0].context == "What has been done?\nA. circle\nB. square"
    (folder / "9" / "data.json").write_text("{")
    (folder / "10" / "data.json").unlink()
    broken = IconQA(root=str(tmp_path))
    assert list(problems(broken)) == ["9", "10"]
    assert broken.score(predictions) == {"accuracy": 0.0}
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="choose_txt not found"):
        IconQA(root=str(tmp_path)).items()


@pytest.mark.parametrize(
    ("write", "build", "folder"),
    [
        (write_science_qa, ScienceQA, "images"),
        (write_mmvp, MMVP, "MMVP Images"),
    ],
)
def test_a_missing_image_folder_is_no_crash(
    write: Callable[[Path], dict[str, str]],
    build: type[Benchmark],
    folder: str,
    tmp_path: Path,
) -> None:
    write(tmp_path)
    shutil.rmtree(tmp_path / folder)
    benchmark = build(root=str(tmp_path))
    assert not problems(benchmark)
    with pytest.raises(ValueError, match="image not found"):
        benchmark.open_image(benchmark.items()[0].images[0])


def test_a_model_is_asked_and_what_cannot_be_asked_is_listed(tiny_options, tmp_path: Path) -> None:
    rows = [
        mmbench_row(1, "cat,dog", "A"),
        mmbench_row(1000001, "dog,cat", "B", image="1"),
        mmbench_row(2, "cat,dog", "A", image="%%% broken base64 %%%"),
        mmbench_row(3, "cat,dog", "D"),
    ]
    write_tsv(tmp_path / "mmbench_dev_20230712.tsv", rows, MMBENCH_COLUMNS)
    model = build_model(stage_configs(load_config("quickstart_covft", tiny_options))[-1][1]).eval()
    benchmark = MMBench(root=str(tmp_path))
    benchmark.max_new_tokens = 2
    result = evaluate(model, InputSpec.of(model), benchmark, tmp_path / "out", weights_id="w")
    assert result.num_items == 4
    assert sorted(result.unreadable) == ["2", "3"]
    assert "base64 is broken" in result.unreadable["2"]
    assert "'answer' is 'D'" in result.unreadable["3"]
    said = [json.loads(line) for line in result.predictions.read_text().splitlines()[1:]]
    assert {record["id"] for record in said} == {"1", "1000001", "2", "3"}
    assert result.metrics == benchmark.score({r["id"]: r["prediction"] for r in said})


def test_unexpected_columns_are_shown_by_check_data(tmp_path: Path) -> None:
    rows = [mmbench_row(1, "cat,dog", "A", extra="x")]
    write_tsv(tmp_path / "mmbench_dev_20230712.tsv", rows, (*MMBENCH_COLUMNS, "extra"))
    assert "unexpected columns: extra" in str(check_data(MMBench(root=str(tmp_path))))
    write_mmbench(tmp_path)
    assert "unexpected" not in str(check_data(MMBench(root=str(tmp_path))))


def test_a_missing_image_folder_is_listed_and_counted(tiny_options, tmp_path: Path) -> None:
    write_mmvp(tmp_path)
    shutil.rmtree(tmp_path / "MMVP Images")
    config = stage_configs(load_config("quickstart_covft", tiny_options))[-1][1]
    model, benchmark = build_model(config).eval(), MMVP(root=str(tmp_path))
    result = evaluate(model, InputSpec.of(model), benchmark, tmp_path / "out", weights_id="w")
    assert sorted(result.unreadable) == ["1", "2", "3", "4", "5", "6"]
    assert "image not found: " in result.unreadable["1"]
    assert result.num_items == 6 and set(result.metrics.values()) == {0.0}
    assert "6 images missing" in str(check_data(benchmark))
