#!/usr/bin/env python3
"""Trains the small Co-DETR (K = 2) for some hundred steps and says whether it learns.

    python scripts/gpu/short_training.py --data FOLDER      with train.json, val.json, images/

Without a folder it draws the digits of the quick start. The status is 0 if the loss falls.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PART = 10  # the first and the last tenth of the steps are compared


def digits(folder: Path, images: int) -> list[str]:
    """Draws the data set; returns the config and overrides for it."""
    counts = ["--train", str(images), "--val", str(max(2, images // 6))]
    command = [sys.executable, "tools/make_digits.py", "--out", str(folder), *counts]
    subprocess.run(command, cwd=ROOT, check=True)
    overrides = [f"data.{split}={folder / split}.json" for split in ("train", "val")]
    overrides += [f"data.{split}_images={folder / split}" for split in ("train", "val")]
    return ["--config-file", "configs/quickstart.py", *overrides]


def own_data(folder: Path) -> list[str]:
    """The config and overrides for a folder of that layout."""
    overrides = [f"data.{split}={folder / split}.json" for split in ("train", "val")]
    overrides += [f"data.{split}_images={folder / 'images'}" for split in ("train", "val")]
    return ["--config-file", "configs/small/co_detr_small.py", *overrides]


def train(arguments: Sequence[str], options: argparse.Namespace, output: Path) -> None:
    command = [sys.executable, "train_net.py", *arguments]
    command += [f"train.device={options.device}", f"train.max_iter={options.steps}"]
    command += ["train.eval_period=0", "train.log_period=1", f"train.output_dir={output}"]
    command += [f"train.checkpointer.period={options.steps}", "train.amp.enabled=false"]
    if options.device == "cuda":
        command += [f"dataloader.{part}.num_workers=4" for part in ("train", "test")]
    else:
        command += ["train.effective_batch_size=2"]
    subprocess.run(command, cwd=ROOT, check=True)


def figures(output: Path) -> dict[str, float]:
    """Loss at both ends, and what the evaluation found."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    losses = [line["total_loss"] for line in lines if "total_loss" in line]
    seconds = [line["time"] for line in lines if "time" in line]
    part = max(1, len(losses) // PART)
    metrics = json.loads((output / "metrics.json").read_text())
    return {
        "first loss": round(statistics.fmean(losses[:part]), 3),
        "last loss": round(statistics.fmean(losses[-part:]), 3),
        "AP": round(metrics["AP"], 2),
        "AP50": round(metrics["AP50"], 2),
        "s per step": round(statistics.median(seconds), 3),
        "steps": len(losses),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--data", type=Path, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--images", type=int, default=600, help="digits to draw (default: 600)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.data is None:
            config = digits(folder / "digits", options.images)
        else:
            config = own_data(options.data.resolve())
        train(config, options, folder / "run")
        found = figures(folder / "run")
    print(f"figures: {json.dumps(found)}")
    if found["last loss"] < found["first loss"]:
        return 0
    print("The loss did not fall.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
