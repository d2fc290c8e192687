"""What a benchmark is: items made from its official files, how an answer counts, its metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from covft.images import load_image


@dataclass(frozen=True)
class Item:
    """A question of a benchmark.

    Attributes:
        id: Stable over runs and machines: predictions are kept under it.
        question: The prompt's text, instructions included, without image tags.
        answer: The reference, as the scoring wants it: a text, or several accepted ones.
        images: Names of the images, which :meth:`Benchmark.open_image` opens; equal names are equal
            images. By default they are paths.
        context: Text that context-aware methods read; by default the question.
        group: What is scored together (both questions about an image, the rotations of a circular
            question, a pair); by default the item itself.
        details: What scoring, exports and reports want besides, such as category or options.
        problem: Why it can't be asked (a broken image, no options); it is listed and counts as
            wrong.
    """

    id: str
    question: str
    answer: str | tuple[str, ...]
    images: tuple[str, ...] = ()
    context: str | None = None
    group: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None

    @property
    def unit(self) -> str:
        """What the item is scored with: its group, or its own id."""
        return self.id if self.group is None else self.group


class Benchmark(ABC):
    """A set of items and the rule that scores answers to them.

    A subclass reads its files in ``read_items`` and says in ``is_correct`` (or ``item_scores``)
    what an answer is worth; one whose metric is no mean over units also overrides ``score``.

    Args:
        root: The folder of its official files, laid out as data/README.md says.
        limit: Ask only the first so many units (see :attr:`Item.group`), whole ones.

    Raises:
        ValueError: If ``limit`` isn't positive, or files are missing or in another format.
    """

    #: Names the benchmark in configs, files and results.
    name: str
    #: Heads its column in tables.
    title: str
    #: Its folder under a data root that holds several benchmarks.
    folder: ClassVar[str]
    #: Longest answer that is generated, in tokens.
    max_new_tokens: int = 16
    #: The metric that tables show, a key of what ``score`` returns.
    metric: ClassVar[str] = "accuracy"
    #: The metric's largest value: what it is divided by, times 100, to be averaged with others.
    max_score: ClassVar[float] = 100.0
    #: Items of the official files; None if that isn't fixed.
    num_official: int | None = None

    def __init__(self, *, root: str, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be positive or None, got {limit}")
        self.root = Path(root)
        self.limit = limit

    @abstractmethod
    def read_items(self) -> list[Item]:
        """Read the official files; return all items, in the official order.

        Raises:
            ValueError: If a file is missing or in another format; it names file, line and field.
        """

    @cached_property
    def _items(self) -> list[Item]:
        items = self.read_items()
        if self.limit is None:
            return items
        kept = set(list(dict.fromkeys(item.unit for item in items))[: self.limit])
        return [item for item in items if item.unit in kept]

    def items(self) -> Sequence[Item]:
        """Return the items to ask, in the official order."""
        return self._items

    def check_requirements(self) -> None:
        """Look for what scoring needs, before hours of inference.

        Raises:
            ImportError: If a library isn't installed; says how to get it.
        """
        return

    def unexpected_columns(self) -> Sequence[str]:
        """Return columns of its tables that official files don't have, once items were read."""
        return ()

    def open_image(self, name: str) -> Image.Image:
        """Open an image of an item as RGB.

        Raises:
            ValueError: If it is missing or can't be read.
        """
        return load_image(name)

    @abstractmethod
    def is_correct(self, prediction: str, item: Item) -> bool:
        """Tell whether an answer counts; an empty one never does."""

    def item_scores(self, predictions: Mapping[str, str]) -> dict[str, float]:
        """Return every unit's score in [0, 1]: 1 if all of its items are right, else 0.

        Reports compare runs by these, and list the units below 1. The benchmark's metric is
        ``max_score`` times their mean, taken over strata where there are several.

        Args:
            predictions: The answers by item id.
        """
        scores: dict[str, float] = {}
        for item in self.items():
            right = item.problem is None and self.is_correct(predictions[item.id], item)
            scores[item.unit] = min(scores.get(item.unit, 1.0), float(right))
        return scores

    def strata(self) -> dict[str, str]:
        """Return the part of the benchmark that each unit is averaged in, such as MME's subtasks.

        Units that aren't named share one. The metric is the mean over the parts of their means.
        """
        return {}

    def score(self, predictions: Mapping[str, str]) -> dict[str, float]:
        """Return the metrics, as papers print them (in percent, unless the benchmark says so).

        Args:
            predictions: The answers by item id.

        Raises:
            ValueError: If an item has no prediction.
        """
        self.check_complete(predictions)
        scores = self.item_scores(predictions)
        return {self.metric: 100 * sum(scores.values()) / len(scores)}

    def notes(self) -> dict[str, str]:
        """Return what results must say besides, such as a tokenizer that scores depend on."""
        return {}

    def check_complete(self, predictions: Mapping[str, str]) -> None:
        """Raise a ValueError if an item has no prediction."""
        items = self.items()
        missing = [item.id for item in items if item.id not in predictions]
        if missing:
            raise ValueError(
                f"{self.name}: {len(missing)} of {len(items)} items have no prediction, "
                f"the first is '{missing[0]}'; run inference again to complete them"
            )

    def export(self, predictions: Mapping[str, str], folder: Path) -> list[Path]:
        """Write the answers in the benchmark's official format, where it has one.

        Args:
            predictions: The answers by item id.
            folder: Where the files are written.

        Returns:
            The files.
        """
        return []
