"""Peak memory and time of a classification loss with a large vocabulary.

    python -m benchmarks.classification_loss [--classes 1203] [--side 1280] [--json FILE]

One image of ``side`` x ``side`` pixels gives a dense head a row of logits for every cell of levels
of strides 4 to 128. Contestants, each in a process of its own, forward and backward:

* ``int64 one-hot``: `F.one_hot`, a float copy of it, and the elementwise loss over all of it;
* ``whole``: a float target, the elementwise loss over all of it;
* ``parts``: `co_detr.modeling.losses.FocalLoss`, which computes parts of the rows and, for the
  gradient, each part again.

Memory is that of the process. It is measured with an allocator that gives freed blocks back at
once, and time, in another run, with the default one, which keeps some.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from fvcore.nn import sigmoid_focal_loss

from benchmarks.common import environment, markdown_table, write_json
from co_detr.modeling.losses import FocalLoss

STRIDES = (4, 8, 16, 32, 64, 128)
MIB = 2**20


def int64_one_hot(logits, labels):
    num_classes = logits.shape[-1]
    target = F.one_hot(labels, num_classes + 1)[..., :num_classes].to(logits.dtype)
    return sigmoid_focal_loss(logits, target, 0.25, 2.0).sum(-1)


def whole(logits, labels):
    target = torch.zeros_like(logits, requires_grad=False)
    foreground = (labels < logits.shape[-1]).to(logits.dtype)
    target.scatter_(-1, labels.clamp(max=logits.shape[-1] - 1)[..., None], foreground[..., None])
    return sigmoid_focal_loss(logits, target, 0.25, 2.0).sum(-1)


CONTESTANTS = {"int64 one-hot": int64_one_hot, "whole": whole, "parts": FocalLoss()}


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def measure(name: str, anchors: int, classes: int) -> dict[str, float]:
    """Peak memory beyond the logits in MiB, the gradient of the logits included, and seconds."""
    torch.manual_seed(0)
    logits = torch.randn(1, anchors, classes, requires_grad=True)
    labels = torch.randint(0, classes + 1, (1, anchors))
    before, peak, done = resident(), 0, False

    def watch():
        nonlocal peak
        while not done:
            peak = max(peak, resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    total = CONTESTANTS[name](logits, labels).sum()
    # Not backward(), which copies the gradient of a leaf; the logits of a model are none.
    (gradient,) = torch.autograd.grad(total, logits)
    seconds = time.perf_counter() - start
    done = True
    watcher.join()
    return {
        "peak_mib": (peak - before) / MIB,
        "logits_mib": logits.numel() * 4 / MIB,
        "seconds": seconds,
        "loss": total.item(),
        "gradient_norm": gradient.double().norm().item(),
    }


def run(command: list[str], variables: dict[str, str]) -> dict[str, float]:
    environment = {**os.environ, **variables}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=1203)
    parser.add_argument("--side", type=int, default=1280)
    parser.add_argument("--json", help="write the results there, too")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    anchors = sum(math.ceil(options.side / stride) ** 2 for stride in STRIDES)
    if options.contestant:
        print(json.dumps(measure(options.contestant, anchors, options.classes)))
        return
    results = {}
    for name in CONTESTANTS:
        command = [sys.executable, __file__, "--contestant", name]
        command += ["--classes", str(options.classes), "--side", str(options.side)]
        results[name] = run(command, {"MALLOC_MMAP_THRESHOLD_": str(MIB)})
        results[name]["seconds"] = run(command, {})["seconds"]
    rows = [
        [name, *(f"{found[key]:.0f}" for key in ("logits_mib", "peak_mib", "seconds"))]
        for name, found in results.items()
    ]
    print(f"{anchors} anchors, {options.classes} classes, float32")
    print(markdown_table(["loss", "logits (MiB)", "peak beyond (MiB)", "seconds"], rows))
    if options.json:
        write_json(options.json, {"environment": environment(), "results": results})


if __name__ == "__main__":
    main()
