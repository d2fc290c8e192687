"""Evaluating a model on benchmarks: the phases, several processes."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from mmengine.dist import get_rank, get_world_size
from torch import distributed

import covft
from covft.checkpoints.run import Run
from covft.engine.subject import Subject
from covft.evaluation import Benchmark, Ranks
from covft.evaluation.chosen import Chosen, check_files
from covft.evaluation.evaluate import (
    Effort,
    EvaluationResult,
    infer,
    predictions_path,
    score_predictions,
    weights_fingerprint,
)
from covft.evaluation.predictions import abridged, asked_digests, load
from covft.models.mllm import MLLM
from covft.models.vision.feature_cache import DEFAULT_MAX_BYTES
from covft.registry import nearest

Phase = Literal["infer", "score", "all"]
#: Types that weights are cast to; CoVFT's and LLaVA's public evaluation is in fp16.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: How many items that couldn't be asked, or had empty answers, a result lists.
_NUM_LISTED = 20


class ScoringError(ValueError):
    """Some benchmarks' answers couldn't be scored; the others' results are there."""


@dataclass(frozen=True)
class Options:
    """How benchmarks are run.

    Attributes:
        phase: Answer the questions ("infer"), score the answers ("score"), or both ("all").
        batch_size: Questions answered at a time.
        precision: A name in :data:`PRECISIONS`; None leaves the weights as they were loaded.
        feature_cache_bytes: See :func:`covft.evaluation.evaluate.infer`.
        blind: Whether to ask about grey images, too.
        tag: Put behind the names of the files of answers.
        ranks: This process among those that share the work.
    """

    phase: Phase = "all"
    batch_size: int = 32
    precision: str | None = None
    feature_cache_bytes: int = DEFAULT_MAX_BYTES
    blind: bool = False
    tag: str = ""
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def shown_blank(self) -> tuple[bool, ...]:
        """Whether images are blank, for each time that the questions are asked."""
        return (False, True) if self.blind else (False,)

    def __post_init__(self) -> None:
        if self.precision is not None:
            check_precision(self.precision, where="evaluation.precision")


def run_benchmarks(
    subject: Subject, chosen: Sequence[Chosen], work_dir: Path, options: Options
) -> Iterator[tuple[str, dict[str, Any], Effort]]:
    """Answer benchmarks' questions and score the answers, one after the other.

    All files are read before the model is built. In phase "score" none is built.

    Args:
        subject: What is evaluated.
        chosen: The benchmarks.
        work_dir: Where ``predictions/`` is.
        options: How.

    Yields:
        Each benchmark's name, what ``results.json`` holds of it, and what was answered here;
        nothing in phase "infer", and on other processes than the first.

    Raises:
        ScoringError: At the end, if answers to some benchmarks couldn't be scored.
        ValueError: If files of a benchmark are missing, or, where only scores are asked for,
            answers are missing or belong to something else.
    """
    check_files(chosen, scored=options.phase != "infer")
    identity = _identity(subject, work_dir, options.ranks)
    if options.phase != "score" and options.precision is not None:
        cast_weights(subject.run.model, options.precision)
    failed: list[tuple[str, Exception]] = []
    for one in chosen:
        effort = Effort()
        if options.phase != "score":
            _infer(subject.run, one.benchmark, work_dir, options, identity, effort)
        if options.phase == "infer" or options.ranks.rank > 0:
            continue
        try:
            entry = _scored(one, work_dir, options, _known(subject, options, identity))
        except Exception as error:  # whatever it is, the next benchmark has nothing to do with it
            failed.append((one.benchmark.name, error))
        else:
            yield one.benchmark.name, entry, effort
    if failed:
        raise ScoringError("\n".join(_failure(*one) for one in failed)) from failed[0][1]


def check_precision(name: str, *, where: str) -> None:
    """Raise a ValueError if a name isn't in :data:`PRECISIONS`; ``where`` is the option."""
    if name not in PRECISIONS:
        raise ValueError(f"{where} '{name}' is unknown; {nearest(name, PRECISIONS)}")


def cast_weights(model: MLLM, precision: str) -> None:
    """Cast a model's weights, but not the LLM's constants: rotary frequencies don't survive it.

    Args:
        model: Changed in place.
        precision: A name in :data:`PRECISIONS`.
    """
    kept = set(model.llm.state_dict())
    constants = {n: b for n, b in model.llm.named_buffers() if n not in kept}
    model.to(PRECISIONS[precision])
    for name, value in constants.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.llm.get_submodule(owner), leaf, value)


def answers_complaints(
    subject: Subject, chosen: Sequence[Chosen], work_dir: Path, options: Options
) -> list[str]:
    """Return what a strict evaluation doesn't accept of answers that aren't scored yet."""
    expected = _known(subject, options, _identity(subject, work_dir, Ranks()))
    entries = {}
    for one in chosen:
        path = predictions_path(work_dir, one.benchmark, tag=options.tag)
        records = load(path, expected, asked_digests(one.benchmark))
        entries[one.benchmark.name] = {
            "num_items": len(one.benchmark.items()),
            "num_official": one.benchmark.num_official,
            "limit": one.benchmark.limit,
            "num_unreadable": sum(record.error is not None for record in records.values()),
        }
    return complaints(entries)


def provenance(subject: Subject, work_dir: Path) -> dict[str, Any]:
    """Return what results were made from and with."""
    return {
        "name": subject.name,
        "weights": weights_fingerprint(subject.weights, remembered=_remembered(work_dir)),
        "weights_files": [str(file) for file in subject.weights],
        "covft": covft.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def complaints(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what a strict evaluation doesn't accept, a line for each benchmark."""
    lines = []
    for name, entry in entries.items():
        official = entry["num_official"]
        if entry["limit"] is None and official not in (None, entry["num_items"]):
            lines.append(f"{name}: {entry['num_items']} items, but officially there are {official}")
        if entry["num_unreadable"]:
            lines.append(f"{name}: {entry['num_unreadable']} items couldn't be asked")
    return lines


def process_ranks() -> Ranks:
    """Return this process among those that the launcher started.

    The others wait as long as the slowest takes, whatever limit the process group has.
    """
    if get_world_size() == 1:
        return Ranks()
    group = distributed.new_group(backend="gloo", timeout=datetime.timedelta(days=14))
    return Ranks(get_rank(), get_world_size(), lambda: distributed.barrier(group))


def _identity(subject: Subject, work_dir: Path, ranks: Ranks) -> dict[str, str]:
    """Return what identifies the model; of several processes, one reads the weights' files."""
    if ranks.rank > 0:
        ranks.wait()
    weights_id = weights_fingerprint(subject.weights, remembered=_remembered(work_dir))
    if ranks.rank == 0:
        ranks.wait()
    return {"weights": weights_id, "model": subject.model_text}


def _remembered(work_dir: Path) -> Path:
    return work_dir / "predictions" / "weights.json"


def _known(subject: Subject, options: Options, identity: Mapping[str, str]) -> dict[str, str]:
    """Return what the fingerprint of answers must hold, as far as no model is needed to tell."""
    known = {**identity, "precision": _precision(options), "resize": str(subject.resize)}
    return known if subject.template is None else {**known, "template": subject.template}


def _precision(options: Options) -> str:
    return options.precision or "as loaded"


def _failure(name: str, error: Exception) -> str:
    # Of an error that nobody wrote a message for, the text alone says little ('answer').
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{name} couldn't be scored: {kind}{error}"


def _infer(
    run: Run,
    benchmark: Benchmark,
    work_dir: Path,
    options: Options,
    identity: Mapping[str, str],
    effort: Effort,
) -> None:
    for blank in options.shown_blank:
        infer(
            run.model,
            run.spec,
            benchmark,
            work_dir,
            weights_id=identity["weights"],
            identity={
                **identity,
                "precision": _precision(options),
                "pretrained": json.dumps(run.model.weights_sources()),
            },
            batch_size=options.batch_size,
            blank_images=blank,
            resize=run.resize,
            tag=options.tag,
            feature_cache_bytes=options.feature_cache_bytes,
            ranks=options.ranks,
            effort=effort,
        )


def _scored(
    one: Chosen, work_dir: Path, options: Options, known: Mapping[str, str]
) -> dict[str, Any]:
    """Score the answers to one benchmark; return its entry in ``results.json``."""
    benchmark = one.benchmark
    expected = {**known, "max_new_tokens": str(benchmark.max_new_tokens)}
    results: dict[bool, EvaluationResult] = {
        blank: score_predictions(
            benchmark,
            predictions_path(work_dir, benchmark, blank_images=blank, tag=options.tag),
            expected={**expected, "images": "grey" if blank else "shown"},
        )
        for blank in options.shown_blank
    }
    seen = results[False]
    return {
        "title": benchmark.title,
        "metric": benchmark.metric,
        "max_score": benchmark.max_score,
        "metrics": seen.metrics,
        "notes": benchmark.notes(),
        "blind_metrics": results[True].metrics if True in results else None,
        "num_items": seen.num_items,
        "num_official": benchmark.num_official,
        "limit": benchmark.limit,
        "num_unreadable": len(seen.unreadable),
        "unreadable": dict(list(seen.unreadable.items())[:_NUM_LISTED]),
        "num_empty": len(seen.empty),
        "empty": list(seen.empty[:_NUM_LISTED]),
        "predictions": str(seen.predictions.relative_to(work_dir)),
        "fingerprint": abridged(seen.fingerprint),
        "config": dict(one.config),
    }
