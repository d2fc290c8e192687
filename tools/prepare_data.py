"""Check and lay out the benchmarks' official files; data/README.md says where they come from.

tools/prepare_data.py check --data-root DIR                 which files are missing, of all
tools/prepare_data.py check mme gqa --open-images           of two, opening every image
tools/prepare_data.py convert ~/Downloads/* --data-root DIR puts downloads where they belong
"""

import argparse
import sys
from pathlib import Path


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    check = tasks.add_parser("check", help="compare what is there with the official numbers")
    check.add_argument(
        "benchmarks",
        nargs="*",
        metavar="NAME",
        default=["all", "downstream"],
        help="names, 'all' (the paper's twelve) or 'downstream'; default: both",
    )
    check.add_argument(
        "--open-images", action="store_true", help="open every image to find damaged ones"
    )
    convert = tasks.add_parser(
        "convert",
        help="unpack downloads to where benchmarks look for them",
        description="Unpacks zip and tar files and copies single files that a benchmark reads. Of "
        "large archives only the images that are asked about are unpacked: give the archives with "
        "the questions in the same call, or before.",
    )
    convert.add_argument("archives", nargs="+", type=Path, metavar="FILE")
    for task in (check, convert):
        task.add_argument("--data-root", default="data", help="default: data")
    return parser.parse_args()


def main() -> int:
    """Run the command line; return the exit status."""
    args = parse_args()
    from covft.evaluation.prepare import asked_images, unpack

    if args.task == "check":
        return _check(args)
    root = Path(args.data_root).expanduser()
    known, broken = set(), set()
    for done in unpack(args.archives, root, lambda: asked_images(_benchmarks(root))):
        if done.error is not None:
            known.add(done.archive)
            if done.is_known or done.archive not in broken:  # both of its turns say so
                print(done)
            broken.add(done.archive)
        elif done.is_known:
            known.add(done.archive)
            print(done)
    unknown = [path for path in args.archives if path.name not in known]
    for path in unknown:
        print(f"{path}: nothing in it that a benchmark needs")
    return int(bool(broken) or len(unknown) == len(args.archives))


def _check(args: argparse.Namespace) -> int:
    from covft.evaluation.check_data import DataReport, check_data
    from covft.evaluation.prepare import broken_images

    status = 0
    for name, config in _configs(args.benchmarks).items():
        try:
            benchmark = _built(config, Path(args.data_root).expanduser())
            report = check_data(benchmark)
        except (ValueError, ImportError) as error:
            report = DataReport(name, error=str(error))
        print(report.line())
        status = status or int(not report.is_complete)
        if args.open_images and report.error is None:
            broken = broken_images(benchmark)
            for reason in broken.values():
                print(f"        {reason}")
            status = status or int(bool(broken))
    return status


def _benchmarks(data_root: Path) -> list:
    return [_built(config, data_root) for config in _configs(["all", "downstream"]).values()]


def _configs(names: list) -> dict:
    from covft.evaluation.benchmarks import SETS, named_benchmarks

    single = dict.fromkeys(one for name in names for one in SETS.get(name, (name,)))
    return dict(zip(single, named_benchmarks(list(single)), strict=True))


def _built(config: dict, data_root: Path) -> object:
    from covft.evaluation.chosen import chosen_benchmarks

    (chosen,) = chosen_benchmarks({}, named=[config], data_root=str(data_root))
    return chosen.benchmark


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
