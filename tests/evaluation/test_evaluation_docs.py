"""docs/evaluation.md: its commands, its table and its own benchmark are what the code has."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image
from untrained_run import untrained_run

from covft.evaluation.benchmarks import DOWNSTREAM, TWELVE, named_benchmarks
from covft.registry import BENCHMARKS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
COMMANDS = [
    line.partition("#")[0].split("tools/")[1].strip()
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
    if "tools/" in line
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def section(heading: str) -> str:
    return TEXT.split(f"\n## {heading}\n")[1].partition("\n## ")[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(
    own_benchmark, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool, *arguments = shlex.split(command)
    if tool == "dist_test.sh":
        tool, arguments = "test.py", arguments[1:]
    monkeypatch.setattr(sys, "argv", [tool, *arguments])
    args = runpy.run_path(str(ROOT / "tools" / tool), run_name="tool")["parse_args"]()
    if getattr(args, "benchmarks", None):
        assert named_benchmarks(args.benchmarks)


def test_the_options_are_those_of_the_tool() -> None:
    source = (ROOT / "tools" / "test.py").read_text(encoding="utf-8")
    for flag in re.findall(r"`(--[a-z-]+)[ `]", section("Commands")):
        assert f'"{flag}"' in source, flag


def test_the_protocol_lists_every_benchmark_with_its_length_limit() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", section("Protocol"), re.MULTILINE)
    assert [name for name, _ in rows] == [*TWELVE, *DOWNSTREAM, "easy_vqa"]
    for name, limit in rows:
        (config,) = named_benchmarks([name])
        assert BENCHMARKS.get(config["type"]).max_new_tokens == int(limit), name


@pytest.fixture
def own_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write the example as a module, with data for it."""
    (code,) = blocks("python")
    (tmp_path / "pets.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "data" / "pets"
    folder.mkdir(parents=True)
    rows = []
    for number, animal in enumerate(("Cat", "dog", "cat")):
        Image.new("RGB", (8, 8), (90 * number, 0, 0)).save(folder / f"{number}.png")
        question = "Which animal is it?"
        rows.append(dict(id=str(number), image=f"{number}.png", question=question, answer=animal))
    (folder / "questions.json").write_text(json.dumps(rows))
    yield
    sys.modules.pop("pets", None)
    BENCHMARKS._module_dict.pop("Pets", None)


def call(monkeypatch: pytest.MonkeyPatch, tool: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [tool, *arguments])
    runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")


def test_a_benchmark_of_ones_own_is_scored_and_shown(
    own_benchmark, tmp_path: Path, tiny_options, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pets import Pets  # what its import in the package would do

    benchmark = Pets(root=str(tmp_path / "data" / "pets"))
    assert benchmark.score({"0": " Cat.", "1": "a dog", "2": ""}) == {
        "accuracy": pytest.approx(100 / 3)
    }
    untrained_run(tmp_path / "run", tiny_options)
    call(monkeypatch, "test.py", "run", "--benchmarks", "pets", "--device", "cpu")
    entry = json.loads((tmp_path / "run" / "results.json").read_text())["benchmarks"]["pets"]
    assert entry["num_items"] == 3 and entry["num_unreadable"] == 0
    assert (tmp_path / "run" / entry["predictions"]).is_file()
    call(monkeypatch, "report.py", "gallery", "run", "--out", "gallery")
    assert "Which animal is it?" in (tmp_path / "gallery" / "pets.html").read_text()


@pytest.mark.parametrize("command", [found for found in COMMANDS if "pets.Pets" in found])
def test_a_benchmark_outside_the_package_is_named_by_its_class(
    own_benchmark, command: str, tmp_path: Path, tiny_options, monkeypatch: pytest.MonkeyPatch
) -> None:
    untrained_run(tmp_path / "run", {**tiny_options, "evaluation.benchmark": {"_delete_": True}})
    tool, _, *options = shlex.split(command)
    call(monkeypatch, tool, "run", "--device", "cpu", *options)
    (path,) = (tmp_path / "run").glob("results*.json")
    assert json.loads(path.read_text())["benchmarks"]["pets"]["num_items"] == 3
