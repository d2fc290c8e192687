"""Score a trained run on its config's benchmark, here or with other options."""

import argparse
import hashlib
import sys
from pathlib import Path

from mmengine.config import DictAction


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a finished run (its --work-dir)")
    parser.add_argument("--device", default=None, help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="change the evaluation, such as evaluation.benchmark.limit=200",
    )
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    args = parse_args()
    from covft.checkpoints import load_run
    from covft.engine.results import evaluate_run

    for key in args.cfg_options or {}:
        if not key.startswith("evaluation."):
            raise ValueError(f"--cfg-options {key}: of a trained run only evaluation.* can change")
    run = load_run(args.run, device=args.device)
    options = args.cfg_options or {}
    run.config.merge_from_dict(options)
    # Other options give other results: they get files of their own.
    digest = hashlib.sha256(repr(sorted(options.items())).encode()).hexdigest()[:8]
    evaluate_run(run, args.run, tag=f"_{digest}" if options else "")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, ImportError, ConnectionError) as error:
        sys.exit(f"error: {error}")
