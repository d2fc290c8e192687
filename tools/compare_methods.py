"""Train and score a config with each VFT method, and print the results as one table.

Everything but the method is the config's. The config's own method has the options that the config
gives it, every other one its defaults. All are checked before the first is trained. Stages that
don't depend on the method are trained once. A comparison that was interrupted goes on where it
stopped: give the same command again.
"""

import argparse
import sys
from pathlib import Path

from mmengine.config import DictAction

from covft.config import find_config
from covft.engine.compare import all_methods, compare_methods


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    known = all_methods()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a config file, or the name of one under configs/")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=known,
        default=known,
        metavar="METHOD",
        help=f"some of {', '.join(known)}; default: all of them",
    )
    parser.add_argument("--work-dir", type=Path, help="default: runs/compare_<config name>")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="change the config for every method, such as train_cfg.max_iters=50; "
        "model.vision.vft.… is the config's own method's alone",
    )
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    args = parse_args()
    work_dir = args.work_dir or Path("runs") / f"compare_{find_config(args.config).stem}"
    table = compare_methods(args.config, args.methods, work_dir=work_dir, options=args.cfg_options)
    print(f"\n{table}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, ImportError, ConnectionError) as error:
        sys.exit(f"error: {error}")
