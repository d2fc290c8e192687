import json
from pathlib import Path

import pytest
import torch
from quickstart_miniature import QUESTIONS

from covft.checkpoints import build_model
from covft.config import load_config, stage_configs
from covft.datasets import InputSpec
from covft.evaluation import Benchmark, EasyVQA, Item
from covft.evaluation.evaluate import answering_order, evaluate
from covft.evaluation.predictions import only_writer
from covft.models import MLLM


@pytest.fixture
def model(tiny_options) -> MLLM:
    return build_model(stage_configs(load_config("quickstart_covft", tiny_options))[-1][1]).eval()


def run(model: MLLM, benchmark: Benchmark, work_dir: Path, **options):
    options = {"weights_id": "w", "batch_size": 4, **options}
    return evaluate(model, InputSpec.of(model), benchmark, work_dir, **options)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scoring_is_exact_match(easy_vqa_root: Path) -> None:
    benchmark = EasyVQA(root=str(easy_vqa_root), limit=4)
    answers = [item.answer for item in benchmark.items()]
    assert answers == ["red", "circle", "yes", "no"]
    predictions = dict(zip("0123", ["Red.", "a circle", "yes", ""], strict=True))
    assert benchmark.score(predictions) == {"accuracy": 50.0}
    predictions.pop("2")
    with pytest.raises(ValueError, match="1 of 4 items have no prediction, the first is '2'"):
        benchmark.score(predictions)


@pytest.fixture
def lively(model: MLLM) -> MLLM:
    """Large random weights: answers of several tokens that differ from item to item."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def test_batches_of_eight_equal_single_questions(
    lively: MLLM, easy_vqa_root: Path, tmp_path: Path
) -> None:
    benchmark = EasyVQA(root=str(easy_vqa_root))
    lengths = []
    generate = lively.generate

    def counted(**batch):
        rows = generate(**batch)
        lengths.extend(len(row) for row in rows)
        return rows

    lively.generate = counted
    eight = run(lively, benchmark, tmp_path / "eight", batch_size=8)
    one = run(lively, benchmark, tmp_path / "one", batch_size=1)
    assert next(lively.parameters()).dtype == torch.float32
    assert answers(eight.predictions) == answers(one.predictions)
    assert eight.num_items == 24 and len(set(answers(eight.predictions).values())) > 6
    assert min(lengths) > 1 and len({len(q) for q, *_ in QUESTIONS}) > 1  # padded prompts


def test_a_killed_inference_goes_on(model: MLLM, easy_vqa_root: Path, tmp_path: Path) -> None:
    benchmark = EasyVQA(root=str(easy_vqa_root), limit=8)
    whole = run(model, benchmark, tmp_path)
    content = whole.predictions.read_bytes()
    rows = content.splitlines(keepends=True)
    whole.predictions.write_bytes(b"".join(rows[:4]) + rows[4][:9])  # torn in the fifth line
    asked = []
    model.vision.register_forward_hook(lambda _m, args, _o: asked.append(len(args[0])))
    again = run(model, benchmark, tmp_path)
    assert again.metrics == whole.metrics
    assert sum(asked) == 5
    assert again.predictions.read_bytes() == content


def test_other_weights_never_mix(model: MLLM, easy_vqa_root: Path, tmp_path: Path) -> None:
    benchmark = EasyVQA(root=str(easy_vqa_root), limit=4)
    first = run(model, benchmark, tmp_path)
    before = first.predictions.read_bytes()
    second = run(model, benchmark, tmp_path, weights_id="other")
    assert second.predictions.with_name("easy_vqa.jsonl.old1").read_bytes() == before
    assert lines(second.predictions)[0] != json.loads(before.splitlines()[0])


def test_unreadable_images_count_as_wrong_and_are_listed(
    model: MLLM, easy_vqa_root: Path, tmp_path: Path
) -> None:
    (easy_vqa_root / "test" / "images" / "0.png").write_bytes(b"no image")
    result = run(model, EasyVQA(root=str(easy_vqa_root), limit=6), tmp_path)
    assert sorted(result.unreadable) == ["0", "1", "2", "3"]
    assert result.num_items == 6
    listed = [record for record in lines(result.predictions)[1:] if "error" in record]
    assert {record["id"] for record in listed} == set("0123")
    assert all(record["prediction"] == "" for record in listed)
    assert "image can't be read" in result.unreadable["2"]


def test_unreadable_images_are_tried_again(
    model: MLLM, easy_vqa_root: Path, tmp_path: Path
) -> None:
    image = easy_vqa_root / "test" / "images" / "0.png"
    benchmark = EasyVQA(root=str(easy_vqa_root), limit=6)
    expected = run(model, benchmark, tmp_path / "whole")
    image.rename(image.with_suffix(".away"))
    assert len(run(model, benchmark, tmp_path).unreadable) == 4
    image.with_suffix(".away").rename(image)
    again = run(model, benchmark, tmp_path)
    assert again.unreadable == {}
    assert again.predictions.read_bytes() == expected.predictions.read_bytes()


def test_items_with_a_problem_and_empty_answers_are_counted_and_wrong(
    model: MLLM, easy_vqa_root: Path, tmp_path: Path
) -> None:
    class Asked(Benchmark):
        name = "asked"

        def read_items(self) -> list[Item]:
            return [
                Item("a", "what is it?", "red"),
                Item("b", "what is it?", "red", problem="row 2 has no options"),
                Item("c", "an <image> tag", "red"),
            ]

        def is_correct(self, prediction: str, item: Item) -> bool:
            return True

    model.generate = lambda input_ids, **_: [[] for _ in input_ids]
    result = run(model, Asked(root=str(tmp_path)), tmp_path)
    assert result.empty == ("a",)
    assert result.unreadable == {
        "b": "row 2 has no options",
        "c": "the question holds a literal <image>",
    }
    assert result.num_items == 3 and result.metrics["accuracy"] == pytest.approx(200 / 3)


def test_a_mended_row_alone_is_asked(model: MLLM, easy_vqa_root: Path, tmp_path: Path) -> None:
    class Mended(EasyVQA):
        broken = True

        def read_items(self) -> list[Item]:
            first, *others = super().read_items()
            if self.broken:
                return [Item("bad", "", "", problem="no row"), *others]
            return [Item("bad", first.question, first.answer, first.images), *others]

    assert list(run(model, Mended(root=str(easy_vqa_root)), tmp_path).unreadable) == ["bad"]
    asked = count_images(model)
    Mended.broken = False
    again = run(model, Mended(root=str(easy_vqa_root)), tmp_path)
    assert sum(asked) == 1 and again.unreadable == {}
    assert not list(tmp_path.rglob("*.old*"))


def test_a_moved_folder_of_data_asks_nothing_again(
    model: MLLM, easy_vqa_root: Path, tmp_path: Path
) -> None:
    whole = run(model, EasyVQA(root=str(easy_vqa_root)), tmp_path)
    asked = count_images(model)
    moved = easy_vqa_root.rename(easy_vqa_root.with_name("moved"))
    assert run(model, EasyVQA(root=str(moved)), tmp_path).metrics == whole.metrics
    assert asked == []


def test_a_second_writer_of_one_file_is_refused(
    model: MLLM, easy_vqa_root: Path, tmp_path: Path
) -> None:
    benchmark = EasyVQA(root=str(easy_vqa_root), limit=4)
    expected = run(model, benchmark, tmp_path)
    with (
        only_writer(expected.predictions),
        pytest.raises(ValueError, match="is being written by another run"),
    ):
        run(model, benchmark, tmp_path, weights_id="other")
    assert not list(tmp_path.rglob("*.old*"))
    run(model, benchmark, tmp_path, weights_id="other")  # the lock is gone


def count_images(model: MLLM) -> list[int]:
    """Return a list that grows with each call of the vision encoder."""
    asked: list[int] = []
    model.vision.register_forward_hook(lambda _m, args, _o: asked.append(len(args[0])))
    return asked


def test_items_of_one_id_are_refused(model: MLLM, tmp_path: Path) -> None:
    class Twins(EasyVQA):
        def read_items(self) -> list[Item]:
            return [Item("a", "what is it?", "red"), Item("a", "and that?", "blue")]

    twins = Twins.__new__(Twins)
    Benchmark.__init__(twins, root=str(tmp_path))
    with pytest.raises(ValueError, match="two items have the id 'a'"):
        run(model, twins, tmp_path)


def test_a_larger_limit_asks_only_what_is_new(
    model: MLLM, easy_vqa_root: Path, tmp_path: Path
) -> None:
    run(model, EasyVQA(root=str(easy_vqa_root), limit=8), tmp_path)
    asked = []
    model.vision.register_forward_hook(lambda _m, args, _o: asked.append(len(args[0])))
    more = run(model, EasyVQA(root=str(easy_vqa_root), limit=10), tmp_path)
    assert sum(asked) == 2 and more.num_items == 10
    fewer = run(model, EasyVQA(root=str(easy_vqa_root), limit=4), tmp_path)
    assert sum(asked) == 2 and fewer.num_items == 4
    assert fewer.predictions.read_bytes() == more.predictions.read_bytes()


def test_blank_images_hide_the_picture(model: MLLM, easy_vqa_root: Path, tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []
    model.vision.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    result = run(model, EasyVQA(root=str(easy_vqa_root), limit=4), tmp_path, blank_images=True)
    assert result.predictions.name == "easy_vqa_blank.jsonl"
    assert (torch.cat(seen) == 128).all()


def test_the_context_is_the_items_own(model: MLLM, easy_vqa_root: Path, tmp_path: Path) -> None:
    class OneItem(Benchmark):
        name = "one"

        def read_items(self) -> list[Item]:
            image = str(easy_vqa_root / "test" / "images" / "0.png")
            return [Item("a", "what is it?", "red", (image,), context="is there a circle?")]

        def is_correct(self, prediction: str, item: Item) -> bool:
            return prediction == item.answer

    read = []
    model.text_encoder.register_forward_hook(lambda _m, args, _o: read.append(args[0]))
    run(model, OneItem(root=str(tmp_path)), tmp_path)
    text = model.text_encoder.tokenizer.decode(read[0][0], skip_special_tokens=True)
    assert text == "is there a circle?".replace("?", " ?") or text == "is there a circle?"


@pytest.mark.parametrize(
    ("images_held", "blank", "encoded"),
    [(None, False, 6), (2, False, 6), (1, False, 6), (0, False, 24), (None, True, 1)],
)
def test_each_image_is_encoded_once_and_answers_stay_the_same(
    lively: MLLM, easy_vqa_root: Path, tmp_path: Path, images_held, blank: bool, encoded: int
) -> None:
    model = lively.double()
    benchmark = EasyVQA(root=str(easy_vqa_root))
    expected = run(model, benchmark, tmp_path, blank_images=blank, feature_cache_bytes=0)
    counts = []
    model.vision.backbone.blocks[0].register_forward_hook(
        lambda _m, args, _o: counts.append(len(args[0]))
    )
    options = {}
    if images_held is not None:
        options = {"feature_cache_bytes": images_held * model.vision.cached_bytes}
    found = run(model, benchmark, tmp_path / "cached", blank_images=blank, **options)
    assert sum(counts) == encoded
    assert answers(found.predictions) == answers(expected.predictions)
    assert len(set(answers(found.predictions).values())) > (1 if blank else 6)  # no constant answer


def answers(path: Path) -> dict[str, str]:
    return {record["id"]: record["prediction"] for record in lines(path)[1:]}


def test_a_cache_too_small_for_an_image_is_explained(
    model: MLLM, easy_vqa_root: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"more than the feature cache's max_bytes \(9\)"):
        run(model, EasyVQA(root=str(easy_vqa_root)), tmp_path, feature_cache_bytes=9)


def test_questions_are_sorted_by_length_within_groups_that_the_cache_holds() -> None:
    items = [
        Item(f"{image}{length}", "q" * length, "", (f"{image}.png",))
        for length in (3, 1, 2)
        for image in "abc"
    ]

    def order(max_images: int | None) -> str:
        return " ".join(item.id for item in answering_order(items, max_images=max_images))

    assert order(None) == order(3) == "a1 b1 c1 a2 b2 c2 a3 b3 c3"
    assert order(2) == "a1 b1 a2 b2 a3 b3 c3 c2 c1"
    assert order(1) == order(0) == "a1 a2 a3 b3 b2 b1 c1 c2 c3"
    pair = Item("pair", "q", "", ("b.png", "c.png"))
    text = Item("text", "qq", "")
    found = answering_order([pair, text, *items[:3]], max_images=2)
    assert [item.id for item in found] == ["text", "pair", "a3", "b3", "c3"]
