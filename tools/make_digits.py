#!/usr/bin/env python
"""Makes the quick-start data set: handwritten digits on photographs, in COCO format."""

import argparse
import sys
from pathlib import Path

from co_detr.tools.digits import DigitsConfig, generate, is_complete


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    defaults = DigitsConfig()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("datasets/digits"), help="output folder")
    parser.add_argument("--train", type=int, default=defaults.train, help="training images")
    parser.add_argument("--val", type=int, default=defaults.val, help="validation images")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--force", action="store_true", help="write it even if it is complete")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        config = DigitsConfig(train=args.train, val=args.val, seed=args.seed)
        if not args.force and is_complete(args.out, config):
            print(f"{args.out} is complete ({config.train} train, {config.val} val images).")
            return 0
        generate(args.out, config)
    except (ValueError, OSError) as error:
        print(f"make_digits: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {config.train} train and {config.val} val images to {args.out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
