"""Inference over a benchmark that survives being killed, and its score."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.logging import print_log

from covft.atomic import atomic_write_text
from covft.datasets.prompts import generate_tokens
from covft.datasets.spec import InputSpec
from covft.datasets.streaming import answer_text
from covft.datasets.tiling import Resizing, Tiles
from covft.evaluation.benchmark import Benchmark, Item
from covft.evaluation.loading import BatchLoader, PreparedBatch
from covft.evaluation.predictions import (
    PredictionWriter,
    Record,
    asked_digests,
    gather,
    load,
    only_writer,
    read_fingerprint,
    shard_path,
)
from covft.evaluation.progress import InferenceProgress
from covft.evaluation.sharding import Ranks, share
from covft.models.mllm import MLLM
from covft.models.vision.feature_cache import DEFAULT_MAX_BYTES, FeatureCache


@dataclass(frozen=True)
class EvaluationResult:
    """What a benchmark gave.

    Attributes:
        metrics: The benchmark's metrics.
        num_items: How many items were scored.
        unreadable: Items that couldn't be asked, with the reason; they count as wrong.
        empty: Items whose answer is empty; they count as wrong, too.
        predictions: The file of answers.
        fingerprint: What the file says that its answers belong to.
    """

    metrics: dict[str, float]
    num_items: int
    unreadable: dict[str, str]
    empty: tuple[str, ...]
    predictions: Path
    fingerprint: Mapping[str, str]


@dataclass
class Effort:
    """What calls of :func:`infer` did.

    Attributes:
        kept: Answers that were there before.
        seconds: How long this process answered questions.
    """

    kept: int = 0
    seconds: float = 0.0


def evaluate(
    model: MLLM,
    spec: InputSpec,
    benchmark: Benchmark,
    work_dir: Path,
    *,
    weights_id: str,
    **options: Any,
) -> EvaluationResult:
    """Answer a benchmark's questions with one process, and score the answers.

    Args:
        model: As for :func:`infer`.
        spec: As for :func:`infer`.
        benchmark: As for :func:`infer`.
        work_dir: As for :func:`infer`.
        weights_id: As for :func:`infer`.
        options: The other arguments of :func:`infer`.

    Raises:
        ValueError: As :func:`infer`.
    """
    path = infer(model, spec, benchmark, work_dir, weights_id=weights_id, **options)
    return score_predictions(benchmark, path, expected={"weights": weights_id})


def infer(
    model: MLLM,
    spec: InputSpec,
    benchmark: Benchmark,
    work_dir: Path,
    *,
    weights_id: str,
    identity: Mapping[str, str] | None = None,
    batch_size: int = 32,
    blank_images: bool = False,
    resize: Resizing = None,
    tag: str = "",
    feature_cache_bytes: int = DEFAULT_MAX_BYTES,
    ranks: Ranks | None = None,
    effort: Effort | None = None,
) -> Path:
    """Answer a benchmark's questions by greedy generation.

    Answers are written as they come, to ``predictions/<benchmark>.jsonl``; a killed run goes on
    where it stopped, also with another number of processes. Answers of other weights, questions or
    prompts are put aside, never mixed in. What can't be asked (a broken image) gets an empty answer
    and its reason, and is tried again when inference is.

    Args:
        model: The model, in eval mode.
        spec: What it expects of its data.
        benchmark: The questions.
        work_dir: Where ``predictions/`` is written.
        weights_id: Identifies the weights, see :func:`weights_fingerprint`.
        identity: What answers depend on besides, by names that a message can show.
        batch_size: Questions answered at a time.
        blank_images: Show mid-grey images instead: the blind baseline.
        resize: How images become squares, a run's ``resize``; None is the encoder's own way.
        tag: Put behind the benchmark's name in the file's.
        feature_cache_bytes: Memory for tokens of images that several questions are about, on the
            model's device; 0 encodes an image anew for every question. Results are equal up to the
            rounding that depends on how images are batched.
        ranks: This process among those that share the work, all of which call this; by default it
            is the only one.
        effort: What the call does is added to it.

    Returns:
        The file of answers; with several processes, complete on process 0 alone.

    Raises:
        ValueError: If ``batch_size`` isn't positive, ``feature_cache_bytes`` is negative or too
            little for a single image, two items have one id, or another run is writing the file.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    ranks = ranks or Ranks()
    effort = effort or Effort()
    cache = FeatureCache(max_bytes=feature_cache_bytes) if feature_cache_bytes else None
    fingerprint = {
        "weights": weights_id,
        **(identity or {}),
        "template": repr(spec.template),
        "resize": str(resize),
        "images": "grey" if blank_images else "shown",
        "max_new_tokens": str(benchmark.max_new_tokens),
    }
    asked = asked_digests(benchmark)
    path = predictions_path(work_dir, benchmark, blank_images=blank_images, tag=tag)
    with only_writer(path) if ranks.rank == 0 else nullcontext():
        if ranks.rank == 0:
            gather(path, fingerprint, asked, keep_errors=False)
        ranks.wait()
        # Without the parts: other processes may be writing theirs already.
        done = load(path, fingerprint, asked, with_parts=False)
        effort.kept += sum(item.id in done for item in benchmark.items())
        todo = [item for item in benchmark.items() if item.id not in done]
        mine = share(todo, rank=ranks.rank, world_size=ranks.world_size)
        loader = BatchLoader(
            answering_order(mine, max_images=_max_images(model, cache, resize)),
            benchmark,
            spec,
            batch_size=batch_size,
            blank_images=blank_images,
            resize=resize,
        )
        own = shard_path(path, rank=ranks.rank, world_size=ranks.world_size)
        bar = _progress(path.stem, len(mine), len(done), ranks)
        with PredictionWriter(own, fingerprint) as writer, bar:
            started = time.perf_counter()
            for batch in loader:
                answers = _answers(model, spec, batch, benchmark, loader, cache)
                writer.add(_records(batch, answers, asked))
                bar.advance(len(batch.ids) + len(batch.errors))
                if batch.ids:
                    effort.seconds += time.perf_counter() - started
                started = time.perf_counter()
        ranks.wait()
        if ranks.rank == 0:
            gather(path, fingerprint, asked, keep_errors=True)
    return path


def predictions_path(
    work_dir: Path, benchmark: Benchmark, *, blank_images: bool = False, tag: str = ""
) -> Path:
    """Return the file of a benchmark's answers."""
    blank = "_blank" if blank_images else ""
    return work_dir / "predictions" / f"{benchmark.name}{blank}{tag}.jsonl"


def score_predictions(
    benchmark: Benchmark, path: Path, *, expected: Mapping[str, str]
) -> EvaluationResult:
    """Score a file of answers; needs no model.

    Args:
        benchmark: The questions.
        path: The file, see :func:`predictions_path`.
        expected: Parts of the file's fingerprint that must be these.

    Raises:
        ValueError: If the file is missing, belongs to something else or lacks answers.
    """
    fingerprint = read_fingerprint(path)
    records = load(path, expected, asked_digests(benchmark))
    answers = {record.id: record.prediction for record in records.values()}
    benchmark.check_complete(answers)
    unreadable = {r.id: r.error for r in records.values() if r.error is not None}
    asked = (record for record in records.values() if record.error is None)
    empty = tuple(record.id for record in asked if not record.prediction.strip())
    if unreadable:
        first = next(iter(unreadable.items()))
        print_log(
            f"{path.stem}: {len(unreadable)} items couldn't be asked and count as wrong, listed in "
            f"{path}; the first is '{first[0]}': {first[1]}",
            logger="current",
            level=logging.WARNING,
        )
    if empty:
        print_log(
            f"{path.stem}: {len(empty)} answers are empty and count as wrong; the first is that "
            f"to '{empty[0]}'",
            logger="current",
            level=logging.WARNING,
        )
    metrics = benchmark.score(answers)
    return EvaluationResult(metrics, len(answers), unreadable, empty, path, fingerprint)


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


def weights_fingerprint(files: Sequence[Path], *, remembered: Path | None = None) -> str:
    """Return a digest of weights files' contents.

    Args:
        files: The files.
        remembered: A JSON file in which the digest is kept, together with the files' sizes and
            times, so that unchanged ones needn't be read again.
    """
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    known = json.loads(json.dumps(stats))
    if remembered is not None and remembered.is_file():
        held = json.loads(remembered.read_text(encoding="utf-8"))
        if held["files"] == known:
            return str(held["digest"])
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    if remembered is not None:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        content = {"files": known, "digest": digest.hexdigest()}
        atomic_write_text(remembered, json.dumps(content, indent=1) + "\n")
    return digest.hexdigest()


def _max_images(model: MLLM, cache: FeatureCache | None, resize: Resizing) -> int | None:
    if cache is None:
        return None
    per_image = resize.max_squares if isinstance(resize, Tiles) else 1
    return cache.max_bytes // (per_image * model.vision.cached_bytes)


def _progress(name: str, num_mine: int, num_done: int, ranks: Ranks) -> InferenceProgress:
    if ranks.world_size == 1:
        return InferenceProgress(name, total=num_done + num_mine, done=num_done)
    name = f"{name} (process 0 of {ranks.world_size})"
    return InferenceProgress(name, total=num_mine, shown=ranks.rank == 0)


def _answers(
    model: MLLM,
    spec: InputSpec,
    batch: PreparedBatch,
    benchmark: Benchmark,
    loader: BatchLoader,
    cache: FeatureCache | None,
) -> list[str]:
    if not batch.ids:
        return []
    rows = generate_tokens(
        model,
        batch.inputs,
        spec,
        max_new_tokens=benchmark.max_new_tokens,
        feature_cache=cache,
    )
    with loader.tokenizer_lock:
        return [answer_text(ids, spec.tokenizer) for ids in rows]


def _records(
    batch: PreparedBatch, answers: Sequence[str], asked: Mapping[str, str]
) -> list[Record]:
    found = [Record(i, asked[i], text) for i, text in zip(batch.ids, answers, strict=True)]
    return found + [Record(i, asked[i], "", reason) for i, reason in batch.errors.items()]
