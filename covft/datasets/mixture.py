"""Several datasets as one, each drawn as often as its weight says."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from covft.datasets.annotations import Record, image_paths
from covft.datasets.base import ConversationDataset, Sizes
from covft.datasets.sample import BadSample, Sample
from covft.datasets.spec import InputSpec
from covft.datasets.subset import checked_fraction, subset
from covft.datasets.tiling import Resizing, checked_resizing
from covft.registry import DATASETS, check_config


@DATASETS.register_module()
class MixtureDataset(ConversationDataset):
    """The samples of several datasets; in an epoch, each is drawn as often as its weight says.

    A weight of 1 takes every sample of a dataset once an epoch, 2 takes each twice, 0.5 a random
    half, and 2.5 each twice and a half of them a third time. The half is the same in every epoch:
    what is seen depends on the seed alone. Samples are named ``member/id``.

    Args:
        datasets: The members' configs by name, each with an optional ``weight``.
        spec: The model's side.
        resize: How images become squares, for members that don't say; what inference does, so that
            members may not do otherwise.
        max_tiles: With ``resize="tiles"``, see :class:`InstructDataset`.
        max_length: Of members that don't say.
        on_bad: Of members that don't say.
        seed: Of the choice that fractional weights ask for.
        fraction: Share of the mixture that is used, see :class:`InstructDataset`.
        fraction_seed: Of that choice.

    Attributes:
        members: The datasets by name.

    Raises:
        ValueError: If a member can't be built, makes squares in another way, or its weight isn't
            positive or so small that no sample of it would be drawn.
    """

    def __init__(
        self,
        datasets: Mapping[str, Mapping[str, Any]],
        *,
        spec: InputSpec,
        resize: str | None = None,
        max_tiles: int | None = None,
        max_length: int | None = None,
        on_bad: str | None = None,
        seed: int = 0,
        fraction: float = 1.0,
        fraction_seed: int | None = None,
    ) -> None:
        self.resize = checked_resizing(resize, max_tiles)
        check_members(datasets, resize=self.resize)
        checked_fraction(fraction, fraction_seed)
        self.spec, self.image_root = spec, Path()
        shared = {"max_length": max_length, "on_bad": on_bad}
        tiling = {"resize": resize, "max_tiles": max_tiles}
        self.members: dict[str, ConversationDataset] = {}
        for name, cfg in datasets.items():
            options = {key: value for key, value in cfg.items() if key != "weight"}
            defaults = {key: value for key, value in shared.items() if value is not None}
            if not tiling.keys() & options.keys():
                defaults |= {key: value for key, value in tiling.items() if value is not None}
            self.members[name] = self._built(name, {**defaults, **options})
        counts = [
            _num_drawn(name, len(member), float(datasets[name].get("weight", 1)))
            for name, member in self.members.items()
        ]
        sizes = [len(member) for member in self.members.values()]
        #: Of every member the number of its first sample among all members'.
        self._firsts = np.cumsum([0, *sizes])[:-1]
        self._numbers = _drawn(sizes, counts, seed)
        if fraction < 1:
            chosen = subset(len(self._numbers), fraction, seed=fraction_seed or 0)
            self._numbers = self._numbers[chosen]
        self.bad = [
            BadSample(f"{name}/{bad.id}", bad.reason)
            for name, member in self.members.items()
            for bad in member.bad
        ]

    def _built(self, name: str, cfg: Mapping[str, Any]) -> ConversationDataset:
        try:
            member: ConversationDataset = DATASETS.build(cfg, default_args={"spec": self.spec})
            _check_same_resize(member.resize, self.resize)
        except ValueError as error:
            raise ValueError(f"train_dataset.datasets.{name}: {error}") from error
        return member

    def _located(self, index: int) -> tuple[str, ConversationDataset, int]:
        number = int(self._numbers[index])
        place = int(np.searchsorted(self._firsts, number, side="right")) - 1
        name = next(itertools.islice(self.members, place, None))
        return name, self.members[name], number - int(self._firsts[place])

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Sample | BadSample:
        name, member, number = self._located(index)
        sample = member[number]
        return replace(sample, id=f"{name}/{sample.id}")

    def record(self, index: int) -> Record:
        """Return the annotation behind an index, with its images' whole paths."""
        name, member, number = self._located(index)
        record = member.record(number)
        paths = [str(member.image_root / path) for path in image_paths(record)]
        return {**record, "id": f"{name}/{record['id']}", **({"image": paths} if paths else {})}

    def has_images(self) -> np.ndarray:
        """Return whether each sample has an image, (N,) bool."""
        found: np.ndarray = np.concatenate([m.has_images() for m in self.members.values()])
        return found[self._numbers]

    def sizes(self) -> Sizes:
        """Return about how large samples are, without tokenising them."""
        return self._joined([member.sizes() for member in self.members.values()])

    def exact_sizes(self, *, num_workers: int = 0, rank: int = 0, world_size: int = 1) -> Sizes:
        """Return how large samples are; see :meth:`ConversationDataset.exact_sizes`."""
        work = {"num_workers": num_workers, "rank": rank, "world_size": world_size}
        return self._joined([member.exact_sizes(**work) for member in self.members.values()])

    def _joined(self, sizes: list[Sizes]) -> Sizes:
        columns = (np.concatenate(column)[self._numbers] for column in zip(*sizes, strict=True))
        return Sizes(*columns)


def _num_drawn(name: str, size: int, weight: float) -> int:
    """Return how many samples of a member an epoch has, at least one."""
    count = round(weight * size)
    if not count:
        raise ValueError(
            f"train_dataset.datasets.{name}.weight={weight:g} of {size} samples rounds to none; "
            "raise it or leave the member out"
        )
    return count


def _drawn(sizes: Sequence[int], counts: Sequence[int], seed: int) -> np.ndarray:
    """Return an epoch's samples by their number among all members', (N,) int32."""
    drawn, first = [], 0
    for place, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        # Of whole samples: a weight's own fraction is inexact, 2.3 % 1 is 0.2999...
        whole, part = divmod(count, size)
        drawn.append(first + np.tile(np.arange(size), whole))
        if part:
            drawn.append(first + subset(size, part / size, seed=seed + place))
        first += size
    return np.concatenate(drawn).astype(np.int32)


def check_dataset(cfg: Mapping[str, Any]) -> None:
    """Check the config of a dataset, and of its members if it's a mixture, without building it.

    Raises:
        ValueError: As :func:`covft.registry.check_config` and :func:`check_members`.
        TypeError: If it's no mapping.
    """
    check_config(cfg, DATASETS, {"spec": None})
    kind = DATASETS.get(cfg["type"]) if isinstance(cfg["type"], str) else cfg["type"]
    if isinstance(kind, type) and issubclass(kind, MixtureDataset):
        resize = checked_resizing(cfg.get("resize"), cfg.get("max_tiles"))
        check_members(cfg["datasets"], resize=resize)


def _check_same_resize(own: Resizing, resize: Resizing) -> None:
    if own != resize:
        raise ValueError(
            f"it makes images square by {own!r}, the mixture by {resize!r}, so that evaluation and "
            "chat couldn't tell which to use; set train_dataset.resize (and max_tiles) to what all "
            "members do"
        )


def check_members(datasets: Mapping[str, Mapping[str, Any]], *, resize: Resizing) -> None:
    """Check the configs of a mixture's members without building them.

    Args:
        datasets: See :class:`MixtureDataset`.
        resize: How the mixture makes images square.

    Raises:
        ValueError: If there is none, an argument is unknown, a weight isn't positive, or a member
            makes images square in another way than the mixture.
    """
    if not isinstance(datasets, Mapping) or not datasets:
        raise ValueError(
            "train_dataset.datasets must be dict(name=dict(type=..., weight=1, ...), ...) of at "
            f"least one dataset, got {datasets!r}"
        )
    for name, cfg in datasets.items():
        where = f"train_dataset.datasets.{name}"
        if not isinstance(cfg, Mapping):
            raise ValueError(f"{where} must be dict(type=..., ...), got {cfg!r}")
        weight = cfg.get("weight", 1)
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not is_number or not 0 < weight < float("inf"):
            raise ValueError(f"{where}.weight must be a positive number, got {weight!r}")
        try:
            options = {key: value for key, value in cfg.items() if key != "weight"}
            check_dataset(options)
            if options.keys() & {"resize", "max_tiles"}:
                own = checked_resizing(options.get("resize"), options.get("max_tiles"))
                _check_same_resize(own, resize)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error
