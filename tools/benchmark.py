"""Measure speed and memory; prints a table, and as the last line all figures as JSON."""

import argparse
import sys


def main() -> None:
    """Run the command line."""
    from covft.perf import comoe
    from covft.perf.timing import json_line, reuse_memory

    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for module in (comoe,):
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(
            name,
            help=(module.__doc__ or "").partition("\n")[0],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument(
            "--malloc",
            choices=["reuse", "default"],
            default="reuse",
            help="reuse: glibc keeps freed memory, so that no page faults are measured; "
            "default: as the environment has it",
        )
        command.set_defaults(module=module)
    args = parser.parse_args()
    if args.malloc == "reuse":
        reuse_memory()
    result = args.module.run(args)
    print(args.module.table(result))
    print(json_line(result))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {error}")
