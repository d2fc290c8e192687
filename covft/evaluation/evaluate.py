"""Inference over a benchmark that survives being killed, and its score."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmengine.logging import print_log
from PIL import Image

from covft.conversation import IMAGE_TOKEN
from covft.datasets.prompts import Prompt, blank_like, generate_answers
from covft.datasets.spec import InputSpec
from covft.datasets.transforms import load_image
from covft.evaluation.benchmark import Benchmark, Item
from covft.evaluation.predictions import Predictions
from covft.models.mllm import MLLM


@dataclass(frozen=True)
class EvaluationResult:
    """What a benchmark gave.

    Attributes:
        metrics: The benchmark's metrics.
        num_items: How many items were scored.
        unreadable: Items whose images couldn't be read, with the reason; they count as wrong.
        predictions: The file of answers.
    """

    metrics: dict[str, float]
    num_items: int
    unreadable: dict[str, str]
    predictions: Path


def evaluate(
    model: MLLM,
    spec: InputSpec,
    benchmark: Benchmark,
    work_dir: Path,
    *,
    weights_id: str,
    batch_size: int = 32,
    blank_images: bool = False,
    resize: str | None = None,
    tag: str = "",
) -> EvaluationResult:
    """Answer a benchmark's questions by greedy generation, and score the answers.

    Answers are written as they come, to ``predictions/<benchmark>.jsonl``; a killed run goes on
    where it stopped. Answers of other weights, questions or prompts are put aside, never mixed in.

    Args:
        model: The model, in eval mode.
        spec: What it expects of its data.
        benchmark: The questions.
        work_dir: Where ``predictions/`` is written.
        weights_id: Identifies the weights, see :func:`weights_fingerprint`.
        batch_size: Questions answered at a time.
        blank_images: Show mid-grey images instead: the blind baseline.
        resize: ``crop``, ``stretch`` or ``pad`` instead of the encoder's own way.
        tag: Put behind the benchmark's name in the file's.
    """
    items = benchmark.items()
    name = benchmark.name + ("_blank" if blank_images else "") + tag
    identity = json.dumps(
        [weights_id, spec.template.name, resize, benchmark.max_new_tokens]
        + [[item.id, item.question, item.context, item.images] for item in items]
    )
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    with Predictions(work_dir / "predictions" / f"{name}.jsonl", fingerprint) as predictions:
        todo = [item for item in items if item.id not in predictions.answers]
        # Prompts of one length need no padding; the answers are kept by id.
        todo.sort(key=lambda item: len(item.question))
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            _answer(model, spec, batch, benchmark, predictions, blank_images, resize)
            done, before = len(predictions.answers), len(predictions.answers) - len(batch)
            if done * 4 // len(items) > before * 4 // len(items):
                print_log(f"{name}: {done} of {len(items)} questions answered", logger="current")
        answers, unreadable = dict(predictions.answers), dict(predictions.errors)
    if unreadable:
        first = next(iter(unreadable.items()))
        print_log(
            f"{name}: {len(unreadable)} items couldn't be read and count as wrong, listed in "
            f"{predictions.path}; the first is '{first[0]}': {first[1]}",
            logger="current",
            level=logging.WARNING,
        )
    return EvaluationResult(benchmark.score(answers), len(items), unreadable, predictions.path)


def weights_fingerprint(files: Sequence[Path]) -> str:
    """Return a digest of weights files' contents."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _answer(
    model: MLLM,
    spec: InputSpec,
    items: Sequence[Item],
    benchmark: Benchmark,
    predictions: Predictions,
    blank_images: bool,
    resize: str | None,
) -> None:
    prompts = []
    for item in items:
        try:
            images = [load_image(path) for path in item.images]
            if IMAGE_TOKEN in item.question:
                raise ValueError(f"the question holds a literal {IMAGE_TOKEN}")
        except ValueError as error:
            predictions.add(item.id, "", error=str(error))
            continue
        prompts.append(_prompt(item, [blank_like(i) for i in images] if blank_images else images))
    if not prompts:
        return
    answers = generate_answers(
        model, prompts, spec, max_new_tokens=benchmark.max_new_tokens, resize=resize
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        predictions.add(prompt.id, answer)


def _prompt(item: Item, images: Sequence[Image.Image]) -> Prompt:
    turns = [{"from": "human", "value": "<image>\n" * len(images) + item.question}]
    context = item.question if item.context is None else item.context
    return Prompt(item.id, turns, images, context)
