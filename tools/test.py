"""Score a run, or a config with a checkpoint, on benchmarks.

tools/test.py RUN                                   what the run's config asks for
tools/test.py RUN --benchmarks all --data-root DIR  the paper's twelve
tools/test.py CONFIG CHECKPOINT --benchmarks gqa    a weights file, a run or a public checkpoint
tools/test.py --benchmarks all --check-data         are their files there? (needs no model)
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmengine.config import DictAction

if TYPE_CHECKING:
    from covft.engine.evaluation import Options
    from covft.engine.subject import Subject


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="?", help="the folder of a finished run, or a config")
    parser.add_argument("checkpoint", nargs="?", help="of a config: a run, weights, a checkpoint")
    parser.add_argument(
        "--benchmarks",
        nargs="+",
        metavar="NAME",
        help="names, 'all' (the paper's twelve) or 'downstream'; default: the config's evaluation",
    )
    parser.add_argument(
        "--data-root", help="the folder that holds the benchmarks' folders; default: data"
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        help="where answers and results.json go; default: the run, or runs/CONFIG-CHECKPOINT",
    )
    parser.add_argument(
        "--phase",
        default="all",
        choices=("infer", "score", "all"),
        help="answer the questions, score the answers (needs no model), or both",
    )
    parser.add_argument(
        "--limit", type=int, help="ask only the first so many; results go to a file of their own"
    )
    parser.add_argument("--batch-size", type=int, help="questions answered at a time")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="of the weights; default: as loaded"
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="fail at the end if items couldn't be asked, or counts aren't the official ones",
    )
    parser.add_argument(
        "--check-data",
        action="store_true",
        help="only tell which files are missing; exit status 1 if some are",
    )
    parser.add_argument("--device", default=None, help="default: cuda if there is one, else cpu")
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm"), default="none")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="change the evaluation, such as evaluation.benchmark.limit=200; results then go to "
        "files of their own",
    )
    args = parser.parse_args()
    if args.target is None and not (args.check_data and args.benchmarks):
        parser.error("name a run, or a config and a checkpoint")
    return args


#: Options that change the same as a key of --cfg-options.
SAME = {
    "data_root": "evaluation.data_root",
    "batch_size": "evaluation.batch_size",
    "precision": "evaluation.precision",
    "limit": "evaluation.benchmark.limit",
}


def check_args(args: argparse.Namespace) -> None:
    """Refuse options that would have no effect."""
    for key in args.cfg_options or {}:
        if not key.startswith("evaluation."):
            raise ValueError(f"--cfg-options {key}: of a trained run only evaluation.* can change")
        if args.target is None:
            raise ValueError(f"--cfg-options {key} changes a run's evaluation, but no run is named")
        if args.benchmarks and key.startswith("evaluation.benchmark"):
            raise ValueError(f"--cfg-options {key} has no effect with --benchmarks; leave one out")
    for name, key in SAME.items():
        if getattr(args, name) is not None and key in (args.cfg_options or {}):
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} and --cfg-options {key} say the same; leave one out")
    for option in ("batch_size", "device"):
        if args.phase == "score" and getattr(args, option) is not None:
            name = "--" + option.replace("_", "-")
            raise ValueError(f"{name} has no effect with --phase score, which asks nothing")


def main() -> None:
    """Run the command line."""
    args = parse_args()
    check_args(args)
    from covft.evaluation.benchmarks import named_benchmarks
    from covft.evaluation.chosen import chosen_benchmarks

    named = named_benchmarks(args.benchmarks) if args.benchmarks else None
    where = {"data_root": args.data_root, "limit": args.limit}
    if args.check_data and args.target is None:
        sys.exit(_report_data({}, named, where))
    from covft.engine import setup_distributed
    from covft.engine.evaluation import ScoringError, process_ranks
    from covft.engine.results import (
        RESULTS_NAME,
        evaluate_subject,
        evaluation_options,
        print_results,
    )
    from covft.engine.subject import config_and_checkpoint, finished_run

    options = args.cfg_options or {}
    subject = None
    if args.checkpoint is not None:
        subject = config_and_checkpoint(args.target, args.checkpoint, device=args.device)
    elif args.target is not None:
        subject = finished_run(args.target, device=args.device)
    evaluation = {}
    if subject is not None:
        subject.config.merge_from_dict(options)
        evaluation = subject.config.get("evaluation") or {}
    if args.check_data:
        sys.exit(_report_data(evaluation, named, where))
    chosen = chosen_benchmarks(evaluation, named=named, **where)
    setup_distributed(args.launcher)
    # Other options give other results: they get files of their own.
    digest = hashlib.sha256(repr(sorted(options.items())).encode()).hexdigest()[:8]
    tag = f"_{digest}" if options else ""
    how = replace(evaluation_options(evaluation), phase=args.phase, tag=tag, ranks=process_ranks())
    if args.batch_size is not None:
        how = replace(how, batch_size=args.batch_size)
    if args.precision is not None:
        how = replace(how, precision=args.precision)
    default = Path(args.target) if args.checkpoint is None else Path("runs") / subject.name
    limited = "" if args.limit is None else f"_limit{args.limit}"
    path = (args.work_dir or default) / f"{Path(RESULTS_NAME).stem}{tag}{limited}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    compare_with = evaluation.get("compare_with") or []
    try:
        scored = evaluate_subject(subject, chosen, path, how)
    except ScoringError:
        if path.is_file():
            print_results(path, compare_with=compare_with)
        raise
    if scored is not None:
        print_results(path, compare_with=compare_with)
    if args.strict and how.ranks.rank == 0:
        _be_strict(subject, chosen, scored, path.parent, how)


def _report_data(evaluation: dict, named: list | None, where: dict) -> int:
    """Print what is there of each benchmark; return the exit status."""
    from covft.evaluation.check_data import DataReport, check_data
    from covft.evaluation.chosen import benchmark_configs, chosen_benchmarks

    status = 0
    for config in benchmark_configs(evaluation) if named is None else named:
        try:
            (one,) = chosen_benchmarks(evaluation, named=[config], **where)
            report = check_data(one.benchmark)
        except (ValueError, ImportError) as error:
            report = DataReport(str(config["type"]), error=str(error))
        print(report.line())
        status = status or int(not report.is_complete)
    return status


def _be_strict(
    subject: Subject, chosen: list, scored: dict | None, work_dir: Path, how: Options
) -> None:
    from covft.engine.evaluation import answers_complaints, complaints

    if scored is None:
        found = answers_complaints(subject, chosen, work_dir, how)
    else:
        names = [one.benchmark.name for one in chosen]
        found = complaints({name: scored["benchmarks"][name] for name in names})
    if found:
        raise ValueError("--strict: " + "; ".join(found))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, ImportError, ConnectionError) as error:
        sys.exit(f"error: {error}")
