"""Tables, comparisons and galleries of what tools/test.py has measured; no model is needed."""

import argparse
import sys
from pathlib import Path


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table", help="the paper's row of each run, with group means")
    table.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    table.add_argument("--format", choices=("markdown", "csv"), default="markdown")
    compare = commands.add_parser("compare", help="differences to the first run, and their chance")
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    compare.add_argument("--draws", type=int, default=10_000, help="of the bootstrap")
    gallery = commands.add_parser("gallery", help="wrong answers, or where two runs differ")
    gallery.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    gallery.add_argument("--max-units", type=int, default=100, help="questions on the page")
    export = commands.add_parser("export", help="answers in the benchmarks' official formats")
    export.add_argument("runs", nargs=1, type=Path, metavar="RUN")
    for command in (compare, gallery, export):
        command.add_argument("--benchmarks", nargs="+", metavar="NAME", help="default: all")
    for command in (gallery, export):
        command.add_argument("--out", type=Path, required=True, help="folder for the files")
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    args = parse_args()
    from covft.evaluation.measured import compare_runs, export_run, gallery_of
    from covft.evaluation.report import check_names, csv_report, markdown_report, read_reported

    reported = [read_reported(run) for run in args.runs]
    check_names([name for name, _ in reported])
    if args.command == "table":
        rows = dict(reported)
        report = csv_report(rows) if args.format == "csv" else markdown_report(rows) + "\n"
        print(report, end="")
    elif args.command == "compare":
        print(compare_runs(args.runs, benchmarks=args.benchmarks, num_draws=args.draws))
    elif args.command == "gallery":
        options = {"benchmarks": args.benchmarks, "max_units": args.max_units}
        for line in gallery_of(args.runs, args.out, **options):
            print(line)
    else:
        for path in export_run(args.runs[0], args.out, benchmarks=args.benchmarks):
            print(path)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {error}")
