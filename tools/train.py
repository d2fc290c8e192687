"""Train a config: every stage, then its evaluation."""

import argparse
import sys
from pathlib import Path

from mmengine.config import DictAction

from covft.config import find_config, load_config


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="a config file, or the name of one under configs/")
    parser.add_argument("--work-dir", type=Path, help="default: runs/<config name>")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CHECKPOINT",
        help="continue an interrupted run, from its newest checkpoint or the given one",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="change config values, such as model.vision.backbone.type=SigLIP",
    )
    parser.add_argument(
        "--launcher",
        choices=("none", "pytorch", "slurm", "mpi"),
        default="none",
        help="what has started this process: torchrun (pytorch), srun or mpirun",
    )
    engine = parser.add_mutually_exclusive_group()
    engine.add_argument(
        "--strategy",
        metavar="NAME",
        help="ddp (the default of several processes), fsdp2, zero2, zero3",
    )
    engine.add_argument("--deepspeed", metavar="NAME", help="the same, as xtuner spells it")
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    work_dir = args.work_dir or Path(
        cfg.get("work_dir") or Path("runs") / find_config(args.config).stem
    )
    from torch import distributed

    from covft.engine.strategies import use_strategy
    from covft.engine.train import train

    if args.strategy or args.deepspeed:
        use_strategy(cfg, args.strategy or args.deepspeed)
    train(cfg, work_dir=work_dir, resume=args.resume, launcher=args.launcher)
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, ImportError, ConnectionError) as error:
        # These say what to change; the way through the code would only hide it.
        sys.exit(f"error: {error}")
