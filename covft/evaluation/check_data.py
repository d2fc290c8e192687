"""Whether a benchmark's files are there and complete, found without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from covft.evaluation.benchmark import Benchmark
from covft.registry import shortened


@dataclass(frozen=True)
class DataReport:
    """What was found of a benchmark.

    Attributes:
        name: The benchmark's.
        num_items: Its items.
        num_official: How many there should be; None if that isn't fixed, or only some were asked
            for.
        missing: Image files that aren't there.
        problems: Items that can't be asked for another reason, by id.
        unexpected: Columns that official files don't have.
        error: Why its files can't be read at all.
    """

    name: str
    num_items: int = 0
    num_official: int | None = None
    missing: tuple[str, ...] = ()
    problems: Mapping[str, str] | None = None
    unexpected: tuple[str, ...] = ()
    error: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing or wrong."""
        return not (self.error or self.missing or self.problems or self.has_wrong_count)

    @property
    def has_wrong_count(self) -> bool:
        """Whether there are more or fewer items than there should be."""
        return self.num_official not in (None, self.num_items)

    def line(self) -> str:
        """Return the report behind a word that says whether all is well."""
        return f"{'ok     ' if self.is_complete else 'MISSING'} {self}"

    def __str__(self) -> str:
        if self.error is not None:
            return f"{self.name}: {self.error}"
        official = "" if self.num_official is None else f" of {self.num_official}"
        parts = [f"{self.name}: {self.num_items}{official} items"]
        if self.has_wrong_count:
            parts.append("NOT the official number")
        if self.missing:
            parts.append(f"{len(self.missing)} images missing: {shortened(self.missing, limit=3)}")
        if self.problems:
            ids = [f"'{key}' ({reason})" for key, reason in self.problems.items()]
            parts.append(f"{len(ids)} items can't be asked: {shortened(ids, limit=3)}")
        if self.unexpected:
            parts.append(f"unexpected columns: {shortened(self.unexpected, limit=3)}")
        return ", ".join(parts)


def check_data(benchmark: Benchmark) -> DataReport:
    """Read a benchmark's files, and look for its images without opening them.

    Libraries that scoring needs are looked for, too. Images that the files themselves hold are
    looked at only where they are asked for.
    """
    try:
        benchmark.check_requirements()
        items = benchmark.items()
    except (ValueError, OSError, ImportError) as error:
        return DataReport(benchmark.name, error=str(error))
    missing: Sequence[str] = ()
    if type(benchmark).open_image is Benchmark.open_image:  # then names are paths
        names = dict.fromkeys(name for item in items for name in item.images)
        missing = [name for name in names if not Path(name).is_file()]
    return DataReport(
        benchmark.name,
        num_items=len(items),
        num_official=None if benchmark.limit is not None else benchmark.num_official,
        missing=tuple(missing),
        problems={item.id: item.problem for item in items if item.problem is not None},
        unexpected=tuple(benchmark.unexpected_columns()),
    )
