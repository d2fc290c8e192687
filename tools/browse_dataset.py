"""Draw training samples as the model gets them: pixels, conversation, supervised parts."""

import argparse
import sys
from pathlib import Path

from mmengine.config import DictAction


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="a config file, or the name of one under configs/")
    parser.add_argument("--stage", help="which stage's data; default: the last stage's")
    parser.add_argument("--num", type=int, default=8, help="how many samples")
    parser.add_argument("--out", type=Path, default=Path("runs/browse"), help="folder for PNGs")
    parser.add_argument("--show", action="store_true", help="open a window; any key: next, q: quit")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE")
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    args = parse_args()
    import cv2

    from covft.checkpoints import build_model
    from covft.config import load_config, stage_configs
    from covft.datasets.browse import draw_sample
    from covft.engine.train import build_dataset
    from covft.registry import nearest

    stages = dict(stage_configs(load_config(args.config, args.cfg_options)))
    name = args.stage or list(stages)[-1]
    if name not in stages:
        raise ValueError(f"no stage '{name}'; {nearest(name, stages)}")
    dataset = build_dataset(stages[name], build_model(stages[name]))
    if not args.show:
        args.out.mkdir(parents=True, exist_ok=True)
    for index in range(min(args.num, len(dataset))):
        picture = draw_sample(dataset, index)
        if args.show:
            cv2.imshow("covft", picture)
            if cv2.waitKey() == ord("q"):
                break
        else:
            cv2.imwrite(str(args.out / f"{name}_{index:04d}.png"), picture)
    if not args.show:
        print(f"{min(args.num, len(dataset))} of {len(dataset)} samples are drawn in {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, ImportError, ConnectionError) as error:
        sys.exit(f"error: {error}")
