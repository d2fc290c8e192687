"""Export a trained run: to transformers, LLaVA's, InternVL's or CoVFT's public layout."""

import argparse
import sys
from pathlib import Path


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a finished run (its --work-dir)")
    parser.add_argument("out", type=Path, help="the folder to write; it must not exist")
    parser.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help="hf (any method), hf-llava, llava, covft or internvl2",
    )
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default: as trained")
    parser.add_argument("--device", help="of the run's side; default: cuda if there is one")
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    args = parse_args()
    from covft.checkpoints.export import export_run

    error = export_run(args.run, args.out, to=args.to, dtype=args.dtype, device=args.device)
    print(f"wrote {args.out}; reloaded, its logits differ from the run's by {error:.1e} (relative)")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, ImportError, ConnectionError) as error:
        sys.exit(f"error: {error}")
