"""Batches of questions prepared ahead of the model: images read and resized, texts tokenised."""

from __future__ import annotations

import os
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from covft.conversation import IMAGE_TOKEN
from covft.datasets.prompts import Prompt, blank_like, collate_samples, prompt_sample
from covft.datasets.spec import InputSpec
from covft.datasets.tiling import Resizing, squares
from covft.evaluation.benchmark import Benchmark, Item

#: Bounds the pixels that are kept for further questions about an image.
_MAX_PIXEL_BYTES = 2**28
_NUM_THREADS = 4


@dataclass(frozen=True)
class PreparedBatch:
    """What the model is asked at a time.

    Attributes:
        ids: The items that are asked.
        inputs: Arguments of :meth:`covft.models.MLLM.generate`; empty if no item is asked.
        errors: Why the other items of the batch can't be asked, by id.
    """

    ids: tuple[str, ...]
    inputs: dict[str, Any]
    errors: dict[str, str]


class BatchLoader:
    """Prepares batches in threads while the model answers the one before.

    Threads share memory, so that an image that several questions are about is read once; and PIL
    gives the interpreter free while it decodes and resizes.

    Args:
        items: The items, in the order in which they are asked.
        benchmark: Opens their images.
        spec: The model's side.
        batch_size: Items at a time.
        blank_images: Show mid-grey images instead.
        resize: How images become squares; None is the encoder's own way.

    Attributes:
        tokenizer_lock: Held while a tokenizer is used: one isn't to be used by two threads.
    """

    def __init__(
        self,
        items: Sequence[Item],
        benchmark: Benchmark,
        spec: InputSpec,
        *,
        batch_size: int,
        blank_images: bool = False,
        resize: Resizing = None,
    ) -> None:
        self.tokenizer_lock = threading.Lock()
        self._benchmark, self._spec, self._resize = benchmark, spec, resize
        self._blank_images = blank_images
        self._batches = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
        self._pixels = _PixelCache(Counter(item.images for item in items if item.images))

    def __iter__(self) -> Iterator[PreparedBatch]:
        num_threads = min(_NUM_THREADS, os.cpu_count() or 1)
        waiting: deque[Future[PreparedBatch]] = deque()
        with ThreadPoolExecutor(num_threads, thread_name_prefix="covft-loader") as threads:
            try:
                for batch in self._batches:
                    waiting.append(threads.submit(self._prepare, batch))
                    if len(waiting) > num_threads:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _prepare(self, items: Sequence[Item]) -> PreparedBatch:
        samples, errors = [], {}
        for item in items:
            try:
                if item.problem is not None:
                    raise ValueError(item.problem)
                if IMAGE_TOKEN in item.question:
                    raise ValueError(f"the question holds a literal {IMAGE_TOKEN}")
                pixels = self._squares(item)
                with self.tokenizer_lock:
                    samples.append(prompt_sample(_prompt(item), pixels, self._spec))
            except (ValueError, OSError) as error:  # OSError: of users' own open_image
                errors[item.id] = str(error)
        if not samples:
            return PreparedBatch((), {}, errors)
        with self.tokenizer_lock:
            inputs = collate_samples(samples, self._spec)
        return PreparedBatch(tuple(sample.id for sample in samples), inputs, errors)

    def _squares(self, item: Item) -> list[Tensor]:
        pixels = self._pixels.take(item.images)
        if pixels is None:
            images = [self._benchmark.open_image(name) for name in item.images]
            if self._blank_images:
                images = [blank_like(image) for image in images]
            pixels = squares(images, self._spec.image, resize=self._resize)
            self._pixels.keep(item.images, pixels)
        return pixels


class _PixelCache:
    """Pixels of images that are asked about again, the last used ones, within a bound of memory.

    Args:
        uses: How often each tuple of images is asked about.
    """

    def __init__(self, uses: Counter[tuple[str, ...]]) -> None:
        self._uses = uses
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[str, ...], list[Tensor]] = OrderedDict()
        self._num_bytes = 0

    def take(self, images: tuple[str, ...]) -> list[Tensor] | None:
        with self._lock:
            self._uses[images] -= 1
            pixels = self._held.get(images)
            if pixels is None:
                return None
            if self._uses[images] > 0:
                self._held.move_to_end(images)
            else:
                self._drop(images)
            return pixels

    def keep(self, images: tuple[str, ...], pixels: list[Tensor]) -> None:
        with self._lock:
            if self._uses[images] <= 0 or images in self._held:
                return
            self._held[images] = pixels
            self._num_bytes += sum(tensor.nbytes for tensor in pixels)
            while self._num_bytes > _MAX_PIXEL_BYTES:
                self._drop(next(iter(self._held)))

    def _drop(self, images: tuple[str, ...]) -> None:
        self._num_bytes -= sum(tensor.nbytes for tensor in self._held.pop(images))


def _prompt(item: Item) -> Prompt:
    turns = [{"from": "human", "value": "<image>\n" * len(item.images) + item.question}]
    context = item.question if item.context is None else item.context
    return Prompt(item.id, turns, context=context)
