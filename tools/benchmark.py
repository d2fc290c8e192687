"""Measure speed and memory; prints a table, and as the last line all figures as JSON."""

import argparse
import contextlib
import importlib
import sys

#: What covft imports, and what is to be installed for it.
_PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "mmengine": "mmengine",
    "cv2": "opencv-python",
    "PIL": "pillow",
    "safetensors": "safetensors",
    "huggingface_hub": "huggingface-hub",
    "filelock": "filelock",
    "orjson": "orjson",
    "rich": "rich",
    "covft": "covft itself (`pip install -e .`, or PYTHONPATH=. in the repository)",
}


def check_packages() -> None:
    """End with a list of what can't be imported, all of it at once."""
    missing = []
    for module, package in _PACKAGES.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            missing.append(f"{package}: {error}")
    if missing:
        sys.exit("error: packages are missing:\n  " + "\n  ".join(missing))


def main() -> None:
    """Run the command line."""
    malloc = argparse.ArgumentParser(add_help=False)
    malloc.add_argument(
        "--malloc",
        choices=["reuse", "default"],
        default="reuse",
        help="reuse: glibc keeps freed memory, so that no page faults are measured; "
        "default: as the environment has it",
    )
    # First of all, as it starts this script again. What can't be imported is told right after.
    if malloc.parse_known_args()[0].malloc == "reuse":
        with contextlib.suppress(ImportError):
            from covft.perf.malloc import reuse_memory

            reuse_memory()
    check_packages()
    from covft.perf import (
        checkpointing,
        comoe,
        data,
        evaluation,
        gpu_suite,
        inference,
        lmloss,
        optim,
        packing,
        train,
        vit_step,
    )
    from covft.perf.timing import json_line

    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for module in (
        comoe,
        lmloss,
        checkpointing,
        optim,
        vit_step,
        train,
        inference,
        packing,
        data,
        evaluation,
        gpu_suite,
    ):
        name = module.__name__.rpartition(".")[2].replace("_", "-")
        command = commands.add_parser(
            name,
            help=(module.__doc__ or "").partition("\n")[0],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            parents=[malloc],
        )
        module.add_arguments(command)
        command.set_defaults(module=module)
    args = parser.parse_args()
    result = args.module.run(args)
    print(args.module.table(result))
    print(json_line(result))
    if result.get("failed"):
        sys.exit(f"error: parts that failed or have no result: {', '.join(result['failed'])}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {error}")
