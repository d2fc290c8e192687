import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from covft.evaluation import Benchmark, Item
from covft.evaluation.gallery import Answers, write_gallery
from covft.evaluation.measured import compare_runs, export_run, gallery_of, open_measured
from covft.evaluation.predictions import PredictionWriter, Record, abridged
from covft.registry import BENCHMARKS


@BENCHMARKS.register_module()
class MeasuredToy(Benchmark):
    """Four questions in two pairs, one of which is <b>odd</b>."""

    name, title, folder = "toy", "To<y", "toy"

    def read_items(self) -> list[Item]:
        return [
            Item(
                id=str(n),
                question=f"is <b>{n}</b> & odd?",
                answer="yes" if n % 2 else "no",
                images=(str(self.root / f"{n}.png"),),
                context="odd",
                group=f"pair{n // 2}",
            )
            for n in range(4)
        ]

    def is_correct(self, prediction: str, item: Item) -> bool:
        return prediction == item.answer

    def export(self, predictions, folder: Path) -> list[Path]:
        path = folder / "toy.json"
        path.write_text(json.dumps(predictions))
        return [path]


def make_run(root: Path, name: str, answers: list[str]) -> Path:
    run, data = root / name, root / "data"
    data.mkdir(exist_ok=True)
    for n in range(3):  # the last image is missing
        Image.new("RGB", (600, 300), (n, 0, 0)).save(data / f"{n}.png")
    path = run / "predictions" / "toy.jsonl"
    fingerprint = {"weights": name, "model": "x = 1\n", "precision": "fp32"}
    with PredictionWriter(path, fingerprint) as writer:
        writer.add(Record(str(n), "", answer) for n, answer in enumerate(answers))
    entry = {
        "title": "To<y",
        "metric": "accuracy",
        "max_score": 100.0,
        "metrics": {"accuracy": 0.0},
        "num_items": 4,
        "predictions": "predictions/toy.jsonl",
        "fingerprint": abridged(fingerprint),
        "config": {"type": "MeasuredToy", "root": str(data)},
    }
    (run / "results.json").write_text(json.dumps({"benchmarks": {"toy": entry}}))
    return run


def test_runs_are_compared_by_their_answers(tmp_path: Path) -> None:
    first = make_run(tmp_path, "first", ["no", "yes", "no", "no"])
    second = make_run(tmp_path, "second", ["no", "yes", "no", "yes"])
    lines = compare_runs([first, second]).splitlines()
    assert lines[2] == "| To<y | first | 50.00 | | | | 2 |"
    assert lines[3].startswith("| To<y | second | 100.00 | +50.00 | +0.00 … +100.00 |")
    assert lines[3].endswith("| 1 / 0 / 2 |")
    with pytest.raises(ValueError, match="needs at least two runs, got 1"):
        compare_runs([first])
    with pytest.raises(ValueError, match=r"no results of 'tyo'.*toy"):
        compare_runs([first, second], benchmarks=["tyo"])


def test_incomplete_answers_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", ["no", "yes", "no"])
    with pytest.raises(ValueError, match="1 of 4 items have no prediction, the first is '3'"):
        open_measured(run, "toy")


def test_answers_that_were_not_scored_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", ["no", "yes", "no", "no"])
    path = run / "predictions" / "toy.jsonl"
    before = path.read_text()
    path.write_text(before.replace("fp32", "fp16"))
    expected = r"score it again: .*--phase score\nprecision: fp16 in the file, fp32 scored$"
    for reader in (
        lambda: compare_runs([run, run]),
        lambda: gallery_of([run], tmp_path / "out"),
        lambda: export_run(run, tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=expected):
            reader()
    path.write_text(before.replace("x = 1", "x = 2"))
    with pytest.raises(ValueError, match=r"model: sha256:\w{16} in the file, sha256:\w{16} scored"):
        open_measured(run, "toy")
    path.write_text(before)
    results = json.loads((run / "results.json").read_text())
    del results["benchmarks"]["toy"]["fingerprint"]
    (run / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="don't say whose answers"):
        open_measured(run, "toy")


def test_a_gallery_shows_what_is_wrong(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", ["no", "", "no", "<script>alert(1)</script>"])
    (line,) = gallery_of([run], tmp_path / "out")
    assert line.endswith("toy.html: 2 questions")
    page = (tmp_path / "out" / "toy.html").read_text()
    assert "2 of 2 are wrong; the first 2 are shown" in page
    assert "is &lt;b&gt;3&lt;/b&gt; &amp; odd?" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "<script>" not in page
    assert "(empty)" in page and "To&lt;y" in page and "odd</pre>" in page
    assert page.count('src="data:image/jpeg;base64,') == 3
    assert "3.png" in page and "image not found" in page
    gallery_of([run], tmp_path / "out", max_units=1)
    assert "the first 1 are shown" in (tmp_path / "out" / "toy.html").read_text()


def test_a_gallery_of_two_runs_shows_where_they_differ(tmp_path: Path) -> None:
    first = make_run(tmp_path, "first", ["yes", "yes", "no", "no"])
    second = make_run(tmp_path, "second", ["yes", "yes", "no", "yes"])
    gallery_of([first, second], tmp_path / "out")
    page = (tmp_path / "out" / "toy.html").read_text()
    assert "1 of 2 are scored differently" in page
    assert page.count("<article>") == 2  # both questions of the second pair
    toy = MeasuredToy(root=str(tmp_path))
    three = [Answers(str(n), {}, {}) for n in range(3)]
    with pytest.raises(ValueError, match="one or two runs, got 3"):
        write_gallery(tmp_path / "x.html", toy, three)
    with pytest.raises(ValueError, match="different questions"):
        write_gallery(tmp_path / "x.html", toy, [three[0], Answers("b", {}, {"u": 1.0})])


def test_answers_are_exported(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", ["a", "b", "c", "d"])
    (path,) = export_run(run, tmp_path / "out")
    assert json.loads(path.read_text()) == {"0": "a", "1": "b", "2": "c", "3": "d"}
    assert path.parent == tmp_path / "out" / "toy"


def test_the_command_prints_a_table(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", ["no", "yes", "no", "no"])
    command = [sys.executable, "tools/report.py", "table"]
    printed = subprocess.run([*command, str(run)], capture_output=True, text=True, check=True)
    assert printed.stdout.splitlines()[0] == "| run | To<y |"
    twice = subprocess.run([*command, str(run), str(run)], capture_output=True, text=True)
    assert twice.returncode == 1 and "one name" in twice.stderr
