"""The evaluator against bare generation: what reading, batching, writing and scoring cost.

Both answer the same questions in the same batches; the bare one has them prepared beforehand. An
image is encoded for each question, so that a cache of features doesn't hide the overhead.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from covft.checkpoints import build_model, load_run
from covft.config import load_config, stage_configs
from covft.datasets.prompts import generate_tokens
from covft.datasets.spec import InputSpec
from covft.datasets.tiling import Resizing
from covft.evaluation.benchmark import Benchmark, Item
from covft.evaluation.evaluate import answering_order, evaluate
from covft.evaluation.loading import BatchLoader
from covft.models.mllm import MLLM
from covft.perf.arguments import settings_of
from covft.perf.timing import conditions, interleaved_medians, num_threads


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        run: Folder of a finished run; None is a tiny model with random weights.
        questions: Questions asked, four about each image.
        batch_size: Questions at a time.
        new_tokens: Longest answer in tokens.
        rounds: How often each variant is timed.
        threads: PyTorch's threads.
    """

    run: str | None = None
    questions: int = 64
    batch_size: int = 8
    new_tokens: int = 8
    rounds: int = 5
    threads: int = 1


class Questions(Benchmark):
    """Questions about images of one colour, made up; an answer is never right.

    Args:
        root: Where the images are written.
        num_questions: How many there are.
        max_new_tokens: Longest answer in tokens.
    """

    name = "made_up"
    title = "Made up"

    def __init__(self, *, root: str, num_questions: int, max_new_tokens: int) -> None:
        super().__init__(root=root)
        self.num_questions, self.max_new_tokens = num_questions, max_new_tokens

    def read_items(self) -> list[Item]:
        """Write the images; return four questions about each."""
        items = []
        for number in range(self.num_questions):
            path = self.root / f"{number // 4}.png"
            if not path.exists():
                Image.new("RGB", (336, 336), (number % 256, 80, 160)).save(path)
            question = f"What is number {number % 4}?"
            items.append(Item(f"{number}", question, "none", images=(str(path),)))
        return items

    def is_correct(self, prediction: str, item: Item) -> bool:
        """Compare."""
        return prediction == item.answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    default = Settings()
    parser.add_argument("--run", metavar="RUN", help="a finished run; default: a tiny model")
    parser.add_argument("--questions", type=int, default=default.questions)
    parser.add_argument("--batch-size", type=int, default=default.batch_size)
    parser.add_argument("--new-tokens", type=int, default=default.new_tokens)
    parser.add_argument("--rounds", type=int, default=default.rounds, help="timings of each run")
    parser.add_argument("--threads", type=int, default=default.threads)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the command line asks for; see :func:`measure`."""
    return measure(settings_of(Settings, args))


def measure(settings: Settings) -> dict[str, Any]:
    """Measure the evaluator against bare generation.

    Returns:
        ``seconds`` of both; ``overhead``, the evaluator's share on top of bare generation;
        ``seconds_per_question``; settings and conditions.

    Raises:
        ValueError: If there is nothing to measure.
    """
    for name in ("questions", "batch_size", "new_tokens", "rounds", "threads"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be positive, got {getattr(settings, name)}")
    with tempfile.TemporaryDirectory() as folder, num_threads(settings.threads):
        model, spec, resize = _model(settings, Path(folder))
        seconds = _timed(model, spec, resize, settings, Path(folder))
        overhead = seconds["evaluator"] / seconds["bare generation"] - 1
        return {
            "benchmark": "evaluation",
            "settings": asdict(settings),
            "conditions": conditions(model.device),
            "seconds": seconds,
            "overhead": overhead,
            "seconds_per_question": {k: v / settings.questions for k, v in seconds.items()},
        }


def table(result: Mapping[str, Any]) -> str:
    """Return a result as text."""
    settings, found = result["settings"], result["conditions"]
    per_question = result["seconds_per_question"]
    model = settings["run"] or "a tiny model"
    lines = [
        f"{settings['questions']} questions to {model} on {found['device']}, "
        f"{settings['batch_size']} at a time, median of {settings['rounds']}",
        *(
            f"{k:16s} {v:9.3f} s {1000 * per_question[k]:9.2f} ms a question"
            for k, v in result["seconds"].items()
        ),
        f"{'overhead':16s} {100 * result['overhead']:+9.1f} %",
    ]
    return "\n".join(lines)


def _timed(
    model: MLLM, spec: InputSpec, resize: Resizing, settings: Settings, folder: Path
) -> dict[str, float]:
    benchmark = Questions(
        root=str(folder), num_questions=settings.questions, max_new_tokens=settings.new_tokens
    )
    ordered = answering_order(benchmark.items(), max_images=None)
    loader = BatchLoader(ordered, benchmark, spec, batch_size=settings.batch_size, resize=resize)
    batches: Sequence[Any] = [batch.inputs for batch in loader]
    number = itertools.count()

    def bare() -> None:
        for inputs in batches:
            generate_tokens(model, inputs, spec, max_new_tokens=settings.new_tokens)

    def evaluator() -> None:
        evaluate(
            model,
            spec,
            benchmark,
            folder / f"{next(number)}",  # or the answers would be there already
            weights_id="none",
            batch_size=settings.batch_size,
            resize=resize,
            feature_cache_bytes=0,
        )

    runs = {"bare generation": bare, "evaluator": evaluator}
    return interleaved_medians(runs, rounds=settings.rounds, device=torch.device(model.device))


def _model(settings: Settings, folder: Path) -> tuple[MLLM, InputSpec, Resizing]:
    if settings.run is not None:
        found = load_run(Path(settings.run))
        return found.model, found.spec, found.resize
    tokenizer = _byte_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder = {"hidden_dim": 32, "depth": 3, "num_heads": 4, "mlp_dim": 64}
    llm = dict(
        model_type="llama",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
    )
    config = load_config(
        "quickstart_full",
        {
            "model.vision.backbone.weights": None,
            "model.vision.backbone.arch": {**encoder, "patch_size": 8, "image_size": 32},
            "model.vision.backbone.select_layer": -1,
            "model.vision.backbone.grid": 4,
            "model.llm.weights": None,
            "model.llm.arch": llm,
            "model.llm.tokenizer": str(folder / "tokenizer"),
            "model.text_encoder": None,
        },
    )
    model = build_model(stage_configs(config)[-1][1]).eval()
    return model, InputSpec.of(model), None


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token per byte, and the quickstart's markup."""
    markup = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*markup, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|endoftext|>"],
    )
