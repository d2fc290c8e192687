"""What a benchmark is: items, prompts and a score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """A question of a benchmark.

    Attributes:
        id: Stable over runs and machines: predictions are kept under it.
        question: The prompt's text.
        answer: The reference.
        images: Paths of the images.
        context: Text that context-aware methods read; by default the question.
    """

    id: str
    question: str
    answer: str
    images: tuple[str, ...] = ()
    context: str | None = None


class Benchmark(ABC):
    """A set of items and the rule that scores answers to them."""

    #: Names the benchmark's files and results.
    name: str
    #: Longest answer that is generated, in tokens.
    max_new_tokens: int = 16

    @abstractmethod
    def items(self) -> Sequence[Item]:
        """Return the items in their official order."""

    @abstractmethod
    def is_correct(self, prediction: str, item: Item) -> bool:
        """Tell whether an answer counts."""

    def score(self, predictions: Mapping[str, str]) -> dict[str, float]:
        """Return the metrics, in [0, 1], from the answers by item id.

        Raises:
            ValueError: If an item has no prediction.
        """
        items = self.items()
        missing = [item.id for item in items if item.id not in predictions]
        if missing:
            raise ValueError(
                f"{self.name}: {len(missing)} of {len(items)} items have no prediction, "
                f"the first is '{missing[0]}'; run inference again to complete them"
            )
        correct = sum(self.is_correct(predictions[item.id], item) for item in items)
        return {"accuracy": correct / len(items)}
