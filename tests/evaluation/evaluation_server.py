"""Evaluates a tiny model in one and two processes and kills some; run by test_sharding.py.

torch is imported once: every evaluating process is a fork of this one, and dies of a real SIGKILL.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from forks import ForkedGroup, forked
from quickstart_miniature import tiny_quickstart, write_easy_vqa

from covft.checkpoints import build_model
from covft.config import load_config, stage_configs
from covft.datasets import InputSpec
from covft.engine.evaluation import process_ranks
from covft.evaluation import EasyVQA, read_predictions
from covft.evaluation.evaluate import infer, score_predictions
from covft.evaluation.predictions import PredictionWriter
from covft.models import MLLM

BATCH_SIZE = 3


def tiny_model(options: dict) -> MLLM:
    model = build_model(stage_configs(load_config("quickstart_covft", options))[-1][1]).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.double()


def answer(model: MLLM, root: Path, work_dir: Path, *, limit: int | None = None) -> None:
    benchmark = EasyVQA(root=str(root), limit=limit)
    spec = InputSpec.of(model)
    parts = {"weights_id": "w", "batch_size": BATCH_SIZE, "ranks": process_ranks()}
    infer(model, spec, benchmark, work_dir, **parts)


def outcome(root: Path, work_dir: Path, *, limit: int | None = None) -> dict:
    """Return answers and scores, and make sure that no item is there twice."""
    path = work_dir / "predictions" / "easy_vqa.jsonl"
    ids = [json.loads(line)["id"] for line in path.read_text().splitlines()[1:]]
    assert len(ids) == len(set(ids)), ids
    found = score_predictions(EasyVQA(root=str(root), limit=limit), path, expected={"weights": "w"})
    return {"predictions": read_predictions(path), "metrics": found.metrics}


def alone(task: Callable[[], None]) -> None:
    assert os.waitpid(forked(task), 0)[1] == 0


def dying(task: Callable[[], None], *, after: int, torn: bool) -> Callable[[], None]:
    """Return the task in a process that kills itself after so many batches' answers.

    Args:
        task: Answers questions.
        after: Batches that are written before.
        torn: Die amid writing the next one, rather than while the model is at it.
    """

    def work() -> None:
        count, add = 0, PredictionWriter.add

        def counted(writer, records):
            nonlocal count
            if count == after:
                if torn:
                    text = "".join(record.line() for record in records)
                    writer._file.write(text[: len(text) // 2 + 7])
                    writer._file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            add(writer, records)

        PredictionWriter.add = counted
        task()

    return work


def killed(task: Callable[[], None], **how) -> bool:
    status = os.waitpid(forked(dying(task, **how)), 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def parts_of_a_killed_pair(model: MLLM, root: Path, work_dir: Path) -> list[str]:
    """Let two processes die with answers that they never merged."""

    def task() -> None:
        dying(lambda: answer(model, root, work_dir), after=2, torn=True)()

    group = ForkedGroup(2)
    for child in [group.fork(rank, task) for rank in range(2)]:
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    names = sorted(path.name for path in (work_dir / "predictions").glob("*.rank*"))
    return [name.split(".")[1] for name in names]


def main(folder: Path, tokenizers: Path) -> None:
    torch.set_num_threads(1)
    root = write_easy_vqa(folder / "data")
    model = tiny_model(tiny_quickstart(tokenizers, root))
    report: dict = {}
    # Every model runs in a fork: threads that this process had started would be missing there.
    alone(lambda: answer(model, root, folder / "one"))
    report["one"] = outcome(root, folder / "one")

    asked = folder / "asked"
    asked.mkdir()

    def note(*_) -> None:
        (asked / os.environ["RANK"]).touch()

    def noted() -> None:
        model.vision.register_forward_hook(note)
        answer(model, root, folder / "two")

    ForkedGroup(2).run(lambda _: noted())
    report["two"] = outcome(root, folder / "two")
    report["files"] = sorted(path.name for path in (folder / "two" / "predictions").iterdir())
    report["asked"] = [(asked / str(rank)).is_file() for rank in range(2)]

    ForkedGroup(3).run(lambda _: answer(model, root, folder / "few", limit=1))
    report["few"] = outcome(root, folder / "few", limit=1)

    moments = [(after, torn) for after in (0, 1, 2) for torn in (False, True)]
    report["kills"] = sum(
        killed(lambda: answer(model, root, folder / "killed"), after=after, torn=torn)
        for after, torn in moments
    )
    alone(lambda: answer(model, root, folder / "killed"))
    report["killed"] = outcome(root, folder / "killed")

    report["left_by_two"] = parts_of_a_killed_pair(model, root, folder / "resumed")
    ForkedGroup(3).run(lambda _: answer(model, root, folder / "resumed"))
    report["resumed"] = outcome(root, folder / "resumed")
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
