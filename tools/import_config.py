"""Convert xtuner configs to one of this project, and list what isn't carried over.

Several configs, such as LLaVA's pre-training and fine-tuning, become the stages of one.
"""

import argparse
import sys
from pathlib import Path


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG", help="xtuner's configs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write it here; default: print it")
    parser.add_argument("--template", help="conversation template instead of xtuner's counterpart")
    parser.add_argument(
        "--train", type=Path, metavar="WORK_DIR", help="train it at once; needs --out"
    )
    args = parser.parse_args()
    if args.train and not args.out:
        parser.error("--train needs --out: a run is resumed by its config")
    return args


def main() -> None:
    """Run the command line."""
    args = parse_args()
    from covft.atomic import atomic_write_text
    from covft.config import load_config
    from covft.interop import import_xtuner

    imported = import_xtuner(*args.configs, template=args.template)
    if args.out is None:
        print(imported.source)
        return
    if args.out.exists():
        raise ValueError(f"{args.out} exists; remove it, or choose another --out")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(args.out, imported.source)
    cfg = load_config(args.out)
    print(f"{args.out}; not carried over, or different:")
    for note in imported.notes:
        print(f"  {note}")
    if args.train:
        from covft.engine.train import train

        train(cfg, work_dir=args.train)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, ImportError, ConnectionError) as error:
        sys.exit(f"error: {error}")
