"""Which benchmarks a config or a command line asks for, built and checked."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from covft.evaluation.benchmark import Benchmark
from covft.registry import BENCHMARKS, nearest

#: What a config's ``evaluation`` holds.
KEYS = {
    "benchmark",
    "benchmarks",
    "data_root",
    "blind",
    "batch_size",
    "precision",
    "feature_cache_bytes",
    "compare_with",
}


@dataclass(frozen=True)
class Chosen:
    """A benchmark, and the config that it was built from."""

    config: Mapping[str, Any]
    benchmark: Benchmark


def chosen_benchmarks(
    evaluation: Mapping[str, Any],
    *,
    named: Sequence[Mapping[str, Any]] | None = None,
    data_root: str | None = None,
    limit: int | None = None,
) -> list[Chosen]:
    """Build benchmarks.

    Args:
        evaluation: A config's ``evaluation``; see :data:`KEYS`. ``benchmark`` is one benchmark's
            config, ``benchmarks`` a list of them, ``data_root`` the folder that holds theirs.
        named: Configs of benchmarks instead of those of ``evaluation``.
        data_root: Instead of ``evaluation``'s; by default "data".
        limit: Instead of each benchmark's own.

    Raises:
        ValueError: If ``evaluation`` has an unknown key or no benchmark, or one can't be built.
    """
    _check_keys(evaluation)
    configs = benchmark_configs(evaluation) if named is None else named
    root = Path(data_root or evaluation.get("data_root") or "data").expanduser()
    chosen = [_built(config, root, limit) for config in configs]
    names = [one.benchmark.name for one in chosen]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"benchmark '{twice}' is asked for twice; its answers are kept by name")
    return chosen


def benchmark_configs(evaluation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the configs of the benchmarks that a config's ``evaluation`` names.

    Raises:
        ValueError: If it has an unknown key or no benchmark.
    """
    _check_keys(evaluation)
    own = [evaluation["benchmark"]] if "benchmark" in evaluation else []
    configs = [*own, *evaluation.get("benchmarks", [])]
    if not configs:
        raise ValueError(
            "the config has no evaluation.benchmark or evaluation.benchmarks; set one, or name "
            "benchmarks on the command line (--benchmarks all)"
        )
    return configs


def check_files(chosen: Sequence[Chosen], *, scored: bool) -> None:
    """Read the files of benchmarks.

    Args:
        chosen: The benchmarks.
        scored: Whether answers are to be scored, too, which may need more packages.

    Raises:
        ValueError: If files or packages are missing, or hold nothing; all of it at once.
    """
    errors = []
    for one in chosen:
        try:
            if scored:
                one.benchmark.check_requirements()
            if not one.benchmark.items():
                errors.append(f"{one.benchmark.name}: its files hold no items")
        except (ValueError, OSError, ImportError) as error:
            errors.append(f"{one.benchmark.name}: {error}")
    if errors:
        raise ValueError("\n".join(errors))


def _check_keys(evaluation: Mapping[str, Any]) -> None:
    for key in evaluation:
        if key not in KEYS:
            raise ValueError(f"evaluation.{key} is unknown; {nearest(key, KEYS)}")


def _built(config: Mapping[str, Any], data_root: Path, limit: int | None) -> Chosen:
    config = dict(config)
    kind = BENCHMARKS.get(config["type"]) if isinstance(config.get("type"), str) else None
    kind = kind or config.get("type")
    if "root" not in config and isinstance(kind, type) and issubclass(kind, Benchmark):
        folder = data_root / kind.folder
        required = inspect.signature(kind).parameters["root"].default is inspect.Parameter.empty
        if required or folder.is_dir():
            config["root"] = str(folder.resolve())
    if limit is not None:
        config["limit"] = limit
    benchmark: Benchmark = BENCHMARKS.build(config)
    return Chosen({**config, "type": _type_name(type(benchmark))}, benchmark)


def _type_name(kind: type[Benchmark]) -> str:
    """Return by what a later process finds a benchmark's class: users' own by their module."""
    if kind.__module__.startswith("covft."):
        return kind.__name__
    return f"{kind.__module__}.{kind.__qualname__}"
