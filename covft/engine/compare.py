"""Several runs of one config that differ in the VFT method: what they share, and their table."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log

from covft.atomic import atomic_write_text
from covft.checkpoints.run import stage_dir
from covft.checkpoints.trainable import WEIGHTS_NAME, trained_config
from covft.config import (
    CONFIG_NAME,
    config_text,
    is_under,
    load_config,
    stage_configs,
    stage_text,
)
from covft.engine.preflight import check_run
from covft.engine.result_tables import first_score, num_questions, score_cells, train_time
from covft.engine.results import read_results
from covft.engine.scalars_hook import SCALARS_NAME
from covft.engine.train import TIMING_NAME, train
from covft.registry import VFT

#: Beside the runs: their table, and all their results.
TABLE_NAME, RESULTS_NAME = "methods.md", "methods.json"
_VFT_KEY = "model.vision.vft"


def all_methods() -> list[str]:
    """Return the names of the registered methods, each once."""
    return sorted({VFT.get(name).__name__ for name in VFT.names()})


def compare_methods(
    config: str | Path,
    methods: Sequence[str],
    *,
    work_dir: Path,
    options: Mapping[str, Any] | None = None,
) -> str:
    """Train and score a config with each method; what is finished already is kept.

    All methods are checked before the first is trained, and the table is written anew after each.

    Args:
        config: A config file, or the name of one; it must have ``evaluation``.
        methods: Names of methods. The config's own method has the options that the config gives
            it, every other one its defaults.
        work_dir: Where a run per method is written, and their table.
        options: Further changes of the config, the same for all methods; those of
            ``model.vision.vft`` are the own method's.

    Returns:
        The table, see :func:`methods_table`, of these methods and of all other finished runs in
        ``work_dir`` that differ from them in nothing but the method.

    Raises:
        ValueError: If the config scores nothing, doesn't go with a method, or options of
            ``model.vision.vft`` would have no effect.
    """
    configs = method_configs(config, methods, options)
    for method, cfg in configs.items():
        if not cfg.get("evaluation"):
            raise ValueError(f"{config} has no 'evaluation', so there is nothing to compare")
        check_run(cfg, work_dir / method)
    table, others = "", list[str]()
    for method, cfg in configs.items():
        for stage in share_stages(cfg, work_dir / method, _runs(work_dir)):
            print_log(f"{method}: stage '{stage}' is the same for all methods; taken as trained")
        train(cfg, work_dir=work_dir / method, resume=True)
        results, others = _comparable_results(work_dir, cfg)
        table = methods_table(results)
        atomic_write_text(work_dir / TABLE_NAME, table + "\n")
        atomic_write_text(work_dir / RESULTS_NAME, json.dumps(results, indent=2) + "\n")
    if others:
        print_log(
            f"not in the table: {', '.join(others)}; their configs differ from this one in more "
            "than the method"
        )
    return table


def method_configs(
    config: str | Path, methods: Sequence[str], options: Mapping[str, Any] | None = None
) -> dict[str, Config]:
    """Return a config for each method, see :func:`compare_methods` for the arguments.

    Raises:
        ValueError: If options of ``model.vision.vft`` are given, but its method isn't compared.
    """
    options = dict(options or {})
    own = _method_of(load_config(config, options))
    others = {key: value for key, value in options.items() if not is_under(key, _VFT_KEY)}
    if own not in methods and (unused := sorted(set(options) - set(others))):
        raise ValueError(
            f"--cfg-options {', '.join(unused)} would have no effect: it is about {own}, the "
            f"config's own method, which isn't among the compared ones ({', '.join(methods)})"
        )
    return {
        method: load_config(config, {**options, f"{_VFT_KEY}.type": method})
        if method == own
        else load_config(config, {**others, _VFT_KEY: {"_delete_": True, "type": method}})
        for method in methods
    }


def share_stages(cfg: Config, work_dir: Path, others: Sequence[Path]) -> list[str]:
    """Take a run's first stages from other runs that trained the same ones.

    A stage is the same if its config and seed are, and those of the stages before it. What the run
    already has is left alone.

    Args:
        cfg: The run's config.
        work_dir: The run's folder.
        others: Folders of other runs.

    Returns:
        The names of the stages that were taken.
    """
    stages = stage_configs(cfg)
    names = [name for name, _ in stages]
    taken: list[str] = []
    # The last stage is the run itself; runs of a single stage keep it in the run's folder.
    for index, name in enumerate(names[:-1]):
        folder = stage_dir(work_dir, name, num_stages=len(stages))
        if (folder / WEIGHTS_NAME).is_file():
            continue
        texts = [stage_text(earlier, seed=cfg.get("seed", 0)) for _, earlier in stages[: index + 1]]
        source = next((run for run in others if _has_trained(run, names, texts)), None)
        if source is None:
            break
        _link(source / name, folder)
        taken.append(name)
    return taken


def methods_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the results of runs, by method, as a Markdown table, the best first."""
    headers, score_columns = score_cells(results)
    lines = [
        f"| method | {' | '.join(headers)} | questions | trainable in vision | training |",
        "|---|" + "---|" * (len(headers) + 3),
    ]
    for method, found in sorted(results.items(), key=lambda row: -first_score(row[1])):
        vision = found.get("trainable_parameters", {}).get("vision")
        cells = [
            *score_columns[method],
            str(num_questions(found)),
            "-" if vision is None else f"{vision:,}",
            train_time(found),
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _runs(work_dir: Path) -> list[Path]:
    return sorted(path for path in work_dir.glob("*") if path.is_dir())


def _method_of(cfg: Config) -> str:
    kind = (cfg.model.vision.get("vft") or {}).get("type", "Freeze")
    found = VFT.get(kind) if isinstance(kind, str) else kind
    return str(getattr(found, "__name__", kind))


def _comparable_results(work_dir: Path, cfg: Config) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the results of the runs that differ from a config in the method alone.

    Returns:
        The results by the runs' names, and the names of the other runs that have results.
    """
    wanted = _text_without_method(cfg)
    results: dict[str, dict[str, Any]] = {}
    others: list[str] = []
    for run in _runs(work_dir):
        found = read_results(run)
        if found is None:
            continue
        try:
            comparable = _text_without_method(load_config(run / CONFIG_NAME)) == wanted
        except (ValueError, FileNotFoundError):  # of another version, or no config at all
            comparable = False
        if comparable:
            results[run.name] = found
        else:
            others.append(run.name)
    return results, others


def _text_without_method(cfg: Config) -> str:
    """Return what a run's score depends on, the compared method left out."""
    cfg = copy.deepcopy(cfg)
    cfg.merge_from_dict({_VFT_KEY: {"_delete_": True, "type": ""}})
    seed = cfg.get("seed", 0)
    texts = [stage_text(stage, seed=seed) for _, stage in stage_configs(cfg)]
    evaluation = cfg.to_dict().get("evaluation") or {}
    benchmarks = {key: evaluation.get(key) for key in ("benchmark", "benchmarks", "data_root")}
    return "".join([*texts, config_text(Config(benchmarks))])


def _has_trained(run: Path, names: Sequence[str], texts: Sequence[str]) -> bool:
    for name, text in zip(names, texts, strict=False):
        weights = run / name / WEIGHTS_NAME
        if not weights.is_file() or trained_config(weights) != text:
            return False
    return True


def _link(source: Path, folder: Path) -> None:
    """Give a run a finished stage of another; the weights come last, they mark it as finished."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (SCALARS_NAME, TIMING_NAME, WEIGHTS_NAME):
        if not (source / name).is_file():
            continue
        (folder / name).unlink(missing_ok=True)
        try:
            os.link(source / name, folder / name)
        except OSError:  # another file system, or one without hard links
            partial = folder / f".{name}.partial"
            shutil.copyfile(source / name, partial)
            partial.replace(folder / name)
