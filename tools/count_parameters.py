"""Count the parameters of configs' models: the last stage's, built without weights."""

import argparse
import json
import sys
from pathlib import Path

COLUMNS = ("vision", "vision_trainable", "trainable", "total")


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="default: all under configs/")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts here, too")
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    args = parse_args()
    from covft.atomic import atomic_write_text
    from covft.config import CONFIG_ROOT, find_config, load_config, stage_configs
    from covft.models.abstract import abstract_model, parameter_counts

    paths = [find_config(name) for name in args.configs] or sorted(CONFIG_ROOT.glob("*.py"))
    width = max(len(path.stem) for path in paths)
    print(" " * width, *(f"{column:>18}" for column in COLUMNS))
    counts = {}
    for path in paths:
        stages = stage_configs(load_config(path))
        counts[path.stem] = parameter_counts(abstract_model(stages[-1][1].model))
        row = (f"{counts[path.stem][column]:>18,}" for column in COLUMNS)
        print(path.stem.ljust(width), *row)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(args.json, json.dumps(counts, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
