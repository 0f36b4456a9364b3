"""What masks cost: one model with and without its mask head, inference and a training step.

    python -m benchmarks.masks [--config-file configs/co_dino/co_dino_r50_instance.py]
        [--only inference] [--size 800x1216] [--detections 100] [--threads 1] [--json FILE]
        [KEY=VALUE ...]

Random weights detect nothing, so the boxes whose masks are predicted are drawn: their sides are
log-uniform from 16 pixels to half of the image. "pasted" also makes the run lengths of all masks in
the image, as an evaluation does. Contestants take turns in a new random order each round.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from detectron2.config import instantiate
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from benchmarks.common import environment, format_ms, interleave, markdown_table, ratio, write_json
from benchmarks.step.memory import MemoryMeter
from co_detr.engine.config import load_config
from co_detr.modeling.geometry import Geometry
from co_detr.process_setup import keep_freed_memory


def random_boxes(number: int, size: tuple[int, int]) -> Tensor:
    """``(number, 4)`` absolute xyxy inside an image (height, width)."""
    extent = torch.tensor([size[1], size[0]], dtype=torch.float32)
    sides = 16 * (extent / 32) ** torch.rand(number, 2)
    low = torch.rand(number, 2) * (extent - sides)
    return torch.cat([low, low + sides], dim=1)


class DrawnBoxes(nn.Module):
    """A postprocessor that does its work, and then gives drawn boxes in place of what it found."""

    def __init__(self, postprocessor: nn.Module, number: int, num_classes: int) -> None:
        super().__init__()
        self.postprocessor, self.number, self.num_classes = postprocessor, number, num_classes

    def forward(self, logits: Tensor, boxes: Tensor, geometry: Geometry) -> list[Instances]:
        self.postprocessor(logits, boxes, geometry)
        return [
            Instances(
                size,
                pred_boxes=Boxes(random_boxes(self.number, size).to(boxes)),
                scores=torch.rand(self.number, device=boxes.device),
                pred_classes=torch.randint(self.num_classes, (self.number,), device=boxes.device),
            )
            for size in geometry.image_sizes
        ]


def make_batch(size: tuple[int, int], num_objects: int, num_classes: int) -> list[dict]:
    """One random image with objects whose masks are ellipses."""
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    truth = Instances(size)
    truth.gt_boxes = Boxes(random_boxes(num_objects, size))
    truth.gt_classes = torch.randint(num_classes, (num_objects,))
    angles = torch.arange(24) * (2 * torch.pi / 24)
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    low, high = truth.gt_boxes.tensor[:, None].split(2, dim=2)
    outlines = (low + high) / 2 + (high - low) / 2 * circle
    polygons = [[outline.flatten().double().numpy()] for outline in outlines]
    truth.gt_masks = BitMasks.from_polygon_masks(
        PolygonMasks(polygons), *size
    )  # as data are loaded
    return [{"image": image, "instances": truth}]


@torch.no_grad()
def detect(model: nn.Module, batch: list[dict], mask_head: nn.Module | None, paste: bool) -> list:
    """One image; with a head also masks."""
    model.eval().mask_head = mask_head
    found = model(batch)[0]["instances"]
    return found.pred_masks.rles() if paste else [found]


def train(model: nn.Module, batch: list[dict], mask_head: nn.Module | None) -> None:
    """Forward and backward pass."""
    model.train().mask_head = mask_head
    model.zero_grad(set_to_none=True)
    with EventStorage():
        sum(model(batch).values()).backward()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", default="configs/co_dino/co_dino_r50_instance.py")
    add("--size", default="800x1216", help="HEIGHTxWIDTH of the network input")
    add("--detections", type=int, default=100, help="boxes whose masks are predicted")
    add("--objects", type=int, default=10, help="ground truths of the image in training")
    add("--threads", type=int, default=1)
    add("--rounds", type=int, default=5)
    add("--only", choices=("inference", "training"), help="one of the two")
    add("--json", type=Path)
    add("opts", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(options.threads)
    size = tuple(map(int, options.size.split("x")))
    torch.manual_seed(0)
    model = instantiate(load_config(options.config_file, options.opts).model)
    head, number = model.mask_head, model.num_classes
    model.postprocessor = DrawnBoxes(model.postprocessor, options.detections, number)
    batch = make_batch(size, options.objects, number)
    contestants = {
        "inference, boxes": partial(detect, model, batch, None, False),
        "inference, masks": partial(detect, model, batch, head, False),
        "inference, pasted": partial(detect, model, batch, head, True),
        "training, boxes": partial(train, model, batch, None),
        "training, masks": partial(train, model, batch, head),
    }
    if options.only is not None:
        contestants = {name: c for name, c in contestants.items() if name.startswith(options.only)}
    memory = MemoryMeter("cpu")
    peaks = {}
    for name, run in contestants.items():  # which warms them up, too
        memory.reset_peak()
        before = memory.current()
        run()
        peaks[name] = memory.peak() - before
    keep_freed_memory()  # as in a run; not before, since peaks would not show then
    timings = interleave(contestants, options.rounds, warm_up=0)
    rows = []
    for name, timing in timings.items():
        boxes = name.partition(",")[0] + ", boxes"
        factor = 1 / ratio(timings[boxes], timing)
        rows.append((name, format_ms(timing), f"{factor:.2f}", f"{peaks[name] / 2**20:.0f}"))
    print(markdown_table(("", "ms (quartiles)", "times boxes", "peak MiB above start"), rows))
    if options.json is not None:
        content = {
            name: {**timing.as_dict(), "peak_bytes": peaks[name]}
            for name, timing in timings.items()
        }
        write_json(options.json, {"environment": environment(), "masks": content})


if __name__ == "__main__":
    main()
