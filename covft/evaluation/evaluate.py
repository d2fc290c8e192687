"""Inference over a benchmark that survives being killed, and its score."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmengine.logging import print_log
from PIL import Image

from covft.conversation import IMAGE_TOKEN
from covft.datasets.prompts import Prompt, blank_like, generate_answers
from covft.datasets.spec import InputSpec
from covft.datasets.tiling import Resizing, Tiles
from covft.datasets.transforms import load_image
from covft.evaluation.benchmark import Benchmark, Item
from covft.evaluation.predictions import Predictions
from covft.models.mllm import MLLM
from covft.models.vision.feature_cache import DEFAULT_MAX_BYTES, FeatureCache


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
    resize: Resizing = None,
    tag: str = "",
    feature_cache_bytes: int = DEFAULT_MAX_BYTES,
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
        resize: How images become squares, a run's ``resize``; None is the encoder's own way.
        tag: Put behind the benchmark's name in the file's.
        feature_cache_bytes: Memory for tokens of images that several questions are about, on the
            model's device; 0 encodes an image anew for every question. Results are equal up to the
            rounding that depends on how images are batched.

    Raises:
        ValueError: If ``feature_cache_bytes`` is negative, or too little for a single image.
    """
    cache = FeatureCache(max_bytes=feature_cache_bytes) if feature_cache_bytes else None
    per_image = resize.max_squares if isinstance(resize, Tiles) else 1
    per_image *= model.vision.cached_bytes
    max_images = None if cache is None else cache.max_bytes // per_image
    items = benchmark.items()
    name = benchmark.name + ("_blank" if blank_images else "") + tag
    identity = json.dumps(
        [weights_id, repr(spec.template), resize and str(resize), benchmark.max_new_tokens]
        + [[item.id, item.question, item.context, item.images] for item in items]
    )
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    with Predictions(work_dir / "predictions" / f"{name}.jsonl", fingerprint) as predictions:
        todo = answering_order(
            [item for item in items if item.id not in predictions.answers], max_images=max_images
        )
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            _answer(model, spec, batch, benchmark, predictions, blank_images, resize, cache)
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


def answering_order(items: Sequence[Item], *, max_images: int | None) -> list[Item]:
    """Order questions so that a batch's are of similar length, and an image's near each other.

    Prompts of one length need no padding. Where a cache can't hold all images, they are taken in
    groups that it can hold. Questions are sorted within a group only, up and down in turn, so that
    batches across two groups have similar lengths, too.

    Args:
        items: The questions.
        max_images: Images that the cache can hold; None if there is no cache.
    """
    by_images: dict[tuple[str, ...], list[Item]] = defaultdict(list)
    for item in items:
        by_images[item.images].append(item)
    groups: list[list[Item]] = [[]]
    held: set[str] = set()
    for images, about_them in by_images.items():
        total = len(held) + len(set(images) - held)
        if max_images is not None and groups[-1] and total > max_images:
            groups.append([])
            held = set()
        held.update(images)
        groups[-1] += about_them
    ordered: list[Item] = []
    for number, group in enumerate(groups):
        ordered += sorted(
            group, key=lambda i: (len(i.images), len(i.question)), reverse=number % 2 == 1
        )
    return ordered


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
    resize: Resizing,
    cache: FeatureCache | None,
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
        model,
        prompts,
        spec,
        max_new_tokens=benchmark.max_new_tokens,
        resize=resize,
        feature_cache=cache,
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        predictions.add(prompt.id, answer)


def _prompt(item: Item, images: Sequence[Image.Image]) -> Prompt:
    turns = [{"from": "human", "value": "<image>\n" * len(images) + item.question}]
    context = item.question if item.context is None else item.context
    return Prompt(item.id, turns, images, context)
