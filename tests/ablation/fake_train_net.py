"""Stands in for train_net.py in the tests of the grid: writes its files, without any training.

It takes `seconds=S` per iteration (0), and `fail=true`, which ends it with an error. It notes in
`calls` beside the runs which folder it was started for.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

MAX_ITER = 4


def main(arguments: list[str]) -> int:
    overrides = dict(text.split("=", 1) for text in arguments if "=" in text)
    folder = Path(overrides["train.output_dir"].strip('"'))
    with open(folder.parents[1] / "calls", "a") as calls:
        calls.write(f"{folder.parent.name} {folder.name} {os.environ['OMP_NUM_THREADS']}\n")
    (folder / "gpu").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    if overrides.get("fail") == "true" and not (folder.parents[1] / "fixed").exists():
        print("a line of the log\nerror: image 7.png is missing: put it there.\nbye")
        return 2
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    marker = folder / "last_checkpoint"
    start = int(marker.read_text()[6:-4]) + 1 if marker.exists() else 0
    for iteration in range(start, MAX_ITER):
        time.sleep(float(overrides.get("seconds", 0)))
        with open(folder / "metrics.jsonl", "a") as log:
            log.write(json.dumps({"iteration": iteration, "total_loss": 1.0, "time": 0.5}) + "\n")
        marker.write_text(f"model_{iteration:07d}.pth")
        if stopping:
            return 0
    marker.write_text("model_final.pth")
    metrics = {"AP": 10.0 + int(overrides["train.seed"]), "AP50": 30.0, "AP75": 5.0}
    (folder / "evaluations.json").write_text(json.dumps({"2": {"AP": 50.0}, "4": metrics}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
