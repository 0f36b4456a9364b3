"""Milliseconds per image of every detector of a model: decoder, heads, merged, cascade.

    python -m benchmarks.detectors --config-file configs/small/co_detr_small.py [--size 192x256]
        [--threads 1] [--json FILE] [KEY=VALUE ...]

One image at a time through `Predictor`'s path (network input in, detections in output resolution
out), weights of `train.init_checkpoint` or random ones. "all" is one pass that gives them all, as
an evaluation with `model.compare_detectors` makes it. Detectors take turns in a new random order
each round, so that a slow minute of the machine hits all of them.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from detectron2.config import instantiate

from benchmarks.common import environment, format_ms, interleave, markdown_table, write_json
from co_detr.checkpoint.saving import Checkpointer
from co_detr.engine.config import load_config


@torch.no_grad()
def detect(model: torch.nn.Module, batch: list[dict], name: str) -> list[dict]:
    """One pass with one detector, or with "all"."""
    model.compare_detectors = name == "all"
    model.evaluate_with = None if name == "all" else name
    return model(batch)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", required=True)
    add("--size", default="192x256", help="HEIGHTxWIDTH of the network input")
    add("--threads", type=int, default=1)
    add("--rounds", type=int, default=40)
    add("--json", type=Path)
    add("opts", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(options.threads)
    height, width = map(int, options.size.split("x"))
    cfg = load_config(options.config_file, options.opts)
    torch.manual_seed(0)
    model = instantiate(cfg.model).eval()
    Checkpointer(model, weights="ema").load(cfg.train.init_checkpoint, checkpointables=[])
    batch = [{"image": torch.randint(0, 256, (3, height, width), dtype=torch.uint8)}]
    timings = interleave(
        {name: partial(detect, model, batch, name) for name in (*model.detectors, "all")},
        options.rounds,
        warm_up=3,
    )
    decoder = timings["decoder"].median
    rows = [
        (name, format_ms(timing), f"{timing.median / decoder:.2f}")
        for name, timing in timings.items()
    ]
    print(markdown_table(("detector", "ms per image (quartiles)", "times the decoder"), rows))
    if options.json is not None:
        content = {name: timing.as_dict() for name, timing in timings.items()}
        write_json(options.json, {"environment": environment(), "detectors": content})


if __name__ == "__main__":
    main()
