"""Which of several processes asks which items."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from covft.evaluation.benchmark import Item


def _nobody() -> None:
    """Wait for nobody: there is one process."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work; they must see one file system.

    Attributes:
        rank: Its number, from 0; process 0 merges the files.
        world_size: How many there are.
        wait: Returns once all of them have called it.
    """

    rank: int = 0
    world_size: int = 1
    wait: Callable[[], None] = _nobody


def share(items: Sequence[Item], *, rank: int, world_size: int) -> list[Item]:
    """Return the items that one process asks.

    Every item is one process's, and no process has more than one more than its part. Questions
    about one image stay together, so that it is encoded once, unless they are more than that.

    Args:
        items: All items, the same on every process.
        rank: The process.
        world_size: How many processes there are.
    """
    if world_size == 1:
        return list(items)
    quota = -(-len(items) // world_size)
    by_images: dict[object, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        by_images[item.images or index].append(index)
    shares: list[list[int]] = [[] for _ in range(world_size)]
    # The largest groups first: what comes last fills the gaps.
    for group in sorted(by_images.values(), key=len, reverse=True):
        while group:
            smallest = min(shares, key=len)
            room = quota - len(smallest)
            smallest += group[:room]
            group = group[room:]
    return [items[index] for index in sorted(shares[rank])]
