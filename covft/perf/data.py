"""Reading data: images against PIL alone, and a large annotation file's opening and memory.

Images are JPEG files (quality 90) of noise on smooth colours, which decode like photographs. The
reference is PIL's own work without any of ours: decode, paste onto a square, resize bicubically.
The annotation file has one record a line like LLaVA's; its memory is what a loader's worker needs
beyond one that has a data set of a single record (USS: pages that no other process has).
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import orjson
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from covft.conversation import get_template
from covft.datasets.instruct import InstructDataset
from covft.datasets.sample import BadSample
from covft.datasets.spec import InputSpec
from covft.datasets.transforms import transform
from covft.images import load_image
from covft.models.vision.image_spec import CLIP_MEAN, CLIP_STD, ImageSpec
from covft.perf.arguments import settings_of
from covft.perf.timing import conditions, interleaved_medians, num_threads

_WORDS = ("the", "picture", "shows", "a", "person", "in", "front", "of", "two", "red", "buildings")
#: Image files, each of which many records name.
_NUM_IMAGES = 8


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        rounds: How often each is timed.
        width: Of the image files, in pixels.
        height: Of the image files, in pixels.
        image_size: Side of the square, in pixels.
        records: Of the annotation file.
        reads: Samples that a worker reads before its memory is looked at.
        start_methods: How workers start: "fork", "spawn" or both.
        tokenizer: Folder or hub id; None makes a small one.
        threads: PyTorch's threads.
    """

    rounds: int = 9
    width: int = 640
    height: int = 480
    image_size: int = 336
    records: int = 100_000
    reads: int = 500
    start_methods: tuple[str, ...] = ("fork", "spawn")
    tokenizer: str | None = None
    threads: int = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    default = Settings()
    parser.add_argument("--rounds", type=int, default=default.rounds, help="timings of each run")
    parser.add_argument("--width", type=int, default=default.width, help="of the images, pixels")
    parser.add_argument("--height", type=int, default=default.height, help="of the images, pixels")
    parser.add_argument("--image-size", type=int, default=default.image_size)
    parser.add_argument("--records", type=int, default=default.records)
    parser.add_argument("--reads", type=int, default=default.reads, help="samples a worker reads")
    parser.add_argument(
        "--start-methods",
        nargs="*",
        choices=["fork", "spawn"],
        default=default.start_methods,
        help="how workers start whose memory is measured; none: not measured",
    )
    parser.add_argument("--tokenizer", help="folder or hub id; by default a small one is made")
    parser.add_argument("--threads", type=int, default=default.threads)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the command line asks for; see :func:`measure`."""
    settings = settings_of(Settings, args)
    return measure(replace(settings, start_methods=tuple(args.start_methods)))


def measure(settings: Settings) -> dict[str, Any]:
    """Measure images and annotations.

    Returns:
        ``images``: ``ms`` an image by path; ``ratio``, ours over PIL's; the largest
        ``pixel_difference``. ``annotations``: ``bytes`` of the file; ``seconds`` to open it for the
        ``first`` time, ``again``, and to parse it ``whole`` into a list, and ``cpu_seconds``, which
        other processes on the machine change less; ``dataset_bytes``, a
        pickled data set's without its spec's; ``workers`` by start method: bytes (``uss``,
        ``rss``) of a worker of this ``dataset`` and of one of a ``single`` record, and what is
        ``added``.

    Raises:
        ValueError: If a number isn't positive.
    """
    numbers = (settings.rounds, settings.width, settings.height, settings.records, settings.reads)
    if min(*numbers, settings.image_size, settings.threads) < 1:
        raise ValueError(f"sizes, rounds and threads must be at least 1, got {settings}")
    with tempfile.TemporaryDirectory() as name, num_threads(settings.threads):
        folder = Path(name)
        paths = _write_images(folder, settings)
        annotations = _write_annotations(folder, paths, settings.records)
        return {
            "benchmark": "data",
            "settings": asdict(settings),
            "conditions": {
                **conditions(torch.device("cpu")),
                "pillow": Image.__version__,
                "numpy": np.__version__,
                "parser": f"orjson {orjson.__version__}",
            },
            "images": _measure_images(settings, paths),
            "annotations": _measure_annotations(settings, annotations),
        }


def table(result: dict[str, Any]) -> str:
    """Return a result of :func:`measure` as text."""
    lines = [
        f"{key}: {value}" for key, value in (result["settings"] | result["conditions"]).items()
    ]
    images, found = result["images"], result["annotations"]
    lines += ["", "an image, ms"]
    lines += [f"{name:<28}{value:>10.2f}" for name, value in images["ms"].items()]
    lines.append(f"{'ours / PIL':<28}{images['ratio']:>10.3f}")
    lines.append(f"{'largest pixel difference':<28}{images['pixel_difference']:>10}")
    lines += ["", f"annotations ({found['bytes'] / 1e6:.0f} MB), s{'of the CPU':>33}"]
    for name, value in found["seconds"].items():
        lines.append(f"{name:<28}{value:>10.3f}{found['cpu_seconds'][name]:>12.3f}")
    lines.append(f"{'data set pickled, MB':<28}{found['dataset_bytes'] / 1e6:>10.2f}")
    for method, workers in found["workers"].items():
        for kind in ("uss", "rss"):
            numbers = [workers[name][kind] / 1e6 for name in ("dataset", "single", "added")]
            lines.append(
                f"{f'worker ({method}), {kind}, MB':<28}{numbers[0]:>10.1f} - {numbers[1]:.1f} = "
                f"{numbers[2]:.1f} added"
            )
    return "\n".join(lines)


def _write_images(folder: Path, settings: Settings) -> list[Path]:
    rng = np.random.default_rng(0)
    size = (settings.width, settings.height)
    paths = []
    for number in range(_NUM_IMAGES):
        colors = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        smooth = np.asarray(colors.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = smooth + rng.normal(0, 8, smooth.shape)
        path = folder / f"coco/train2017/{number:012d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        paths.append(path)
    return paths


def _write_annotations(folder: Path, images: Sequence[Path], count: int) -> Path:
    """Write records of about a kilobyte, of one to five questions with answers."""
    rng = np.random.default_rng(1)
    path = folder / "records.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            turns: list[dict[str, str]] = []
            for question in range(int(rng.integers(1, 6))):
                words = rng.choice(_WORDS, int(rng.integers(20, 60))).tolist()
                tag = "" if question else "<image>\n"
                turns.append({"from": "human", "value": tag + " ".join(words[:10])})
                turns.append({"from": "gpt", "value": " ".join(words[10:])})
            image = str(images[number % len(images)].relative_to(folder))
            record = {"id": f"{number:012d}", "image": image, "conversations": turns}
            file.write(json.dumps(record) + "\n")
    return path


def _measure_images(settings: Settings, paths: Sequence[Path]) -> dict[str, Any]:
    spec = ImageSpec(settings.image_size, CLIP_MEAN, CLIP_STD, "pad")

    def ours() -> list[torch.Tensor]:
        return [transform(load_image(path), spec) for path in paths]

    def pil() -> list[Image.Image]:
        return [_resized_by_pil(path, spec) for path in paths]

    seconds = interleaved_medians(
        {"PIL": pil, "ours": ours}, rounds=settings.rounds, device=torch.device("cpu")
    )
    differences = [
        np.abs(np.asarray(wanted).transpose(2, 0, 1).astype(int) - found.numpy()).max()
        for wanted, found in zip(pil(), ours(), strict=True)
    ]
    return {
        "ms": {name: 1000 * value / len(paths) for name, value in seconds.items()},
        "ratio": seconds["ours"] / seconds["PIL"],
        "pixel_difference": int(max(differences)),
        "count": len(paths),
    }


def _resized_by_pil(path: Path, spec: ImageSpec) -> Image.Image:
    image = Image.open(path)
    width, height = image.size
    side = max(width, height)
    red, green, blue = (int(value * 255) for value in spec.mean)
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square.resize((spec.image_size, spec.image_size), Image.Resampling.BICUBIC)


def _measure_annotations(settings: Settings, path: Path) -> dict[str, Any]:
    spec = InputSpec(
        tokenizer=_tokenizer(settings.tokenizer),
        template=get_template("v1" if settings.tokenizer else "qa"),
        image=ImageSpec(settings.image_size, CLIP_MEAN, CLIP_STD, "pad"),
        num_image_tokens=576,
    )
    seconds: dict[str, list[float]] = {"first": [], "again": [], "whole": []}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in seconds}

    def opened() -> InstructDataset:
        return InstructDataset(str(path), spec=spec, image_root=str(path.parent))

    def timed(name: str) -> None:
        started, cpu_started = time.perf_counter(), time.process_time()
        if name == "whole":
            with path.open("rb") as file:
                whole = [json.loads(line) for line in file]
            assert len(whole) == settings.records
        else:
            opened()
        seconds[name].append(time.perf_counter() - started)
        cpu_seconds[name].append(time.process_time() - cpu_started)

    for number in range(max(settings.rounds // 3, 1)):
        with _cache(path.parent / f"cache{number}"):
            for name in seconds:
                timed(name)
    with _cache(path.parent / "cache0"):
        return {
            "bytes": path.stat().st_size,
            "records": settings.records,
            "seconds": {name: median(values) for name, values in seconds.items()},
            "cpu_seconds": {name: median(values) for name, values in cpu_seconds.items()},
            "dataset_bytes": len(pickle.dumps(opened())) - len(pickle.dumps(spec)),
            "workers": {
                method: _worker_memory(opened(), settings, method)
                for method in settings.start_methods
            },
        }


@contextmanager
def _cache(folder: Path) -> Iterator[None]:
    """Let the cache be in a folder for a while."""
    before = os.environ.get("COVFT_CACHE")
    os.environ["COVFT_CACHE"] = str(folder)
    try:
        yield
    finally:
        del os.environ["COVFT_CACHE"]
        if before is not None:
            os.environ["COVFT_CACHE"] = before


def _tokenizer(name: str | None) -> PreTrainedTokenizerFast:
    if name is not None:
        found: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(name)
        return found
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "</s>", *_WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="</s>")


def _worker_memory(dataset: InstructDataset, settings: Settings, method: str) -> dict[str, Any]:
    """Return the memory of a worker that has read some samples, and of one with a single record."""
    single = InstructDataset(
        [dataset.record(0)], spec=dataset.spec, image_root=str(dataset.image_root)
    )
    found: dict[str, dict[str, int]] = {}
    for name, read in (("single", single), ("dataset", dataset)):
        loader = DataLoader(
            _Memory(read, settings.reads),
            batch_size=None,
            num_workers=1,
            multiprocessing_context=method,
            collate_fn=_unchanged,
        )
        found[name] = next(iter(loader))
    added = {kind: found["dataset"][kind] - found["single"][kind] for kind in found["single"]}
    return {**found, "added": added}


class _Memory(Dataset[dict[str, int]]):
    """Reads samples from everywhere in a data set, then tells the process's memory."""

    def __init__(self, dataset: InstructDataset, reads: int) -> None:
        self._dataset, self._reads = dataset, reads

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, int]:
        for place in np.linspace(0, len(self._dataset) - 1, self._reads).astype(int).tolist():
            sample = self._dataset[place]
            assert not isinstance(sample, BadSample), sample.reason
        return process_memory()


def process_memory() -> dict[str, int]:
    """Return this process's resident bytes: its own (``uss``), and with shared ones (``rss``).

    Raises:
        ValueError: If the system doesn't tell; Linux does.
    """
    path = Path("/proc/self/smaps_rollup")
    if not path.exists():
        raise ValueError(f"workers' memory is read from {path}, which only Linux has")
    sizes: dict[str, int] = {}
    for line in path.read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        sizes[name] = 1024 * int(value.split()[0])
    return {"uss": sizes["Private_Clean"] + sizes["Private_Dirty"], "rss": sizes["Rss"]}


def _unchanged(found: Any) -> Any:
    return found
