"""Time of an evaluation of COCO's size: this project's evaluator against pycocotools.

    python -m benchmarks.evaluation [--images 5000] [--classes 80] [--detections 100]

Ground truth and detections are made up: as many as COCO's val set and a DETR have, with objects of
all sizes, crowd regions, and detections near and far from objects. Both get the same ones; the
program prints the seconds of one processor core that each takes, their ratio, and the largest
difference between two numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from detectron2.data import MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from co_detr.data.coco_classes import dataset_name
from co_detr.engine import evaluators

OBJECTS = 7.3  # of an image, on average as in COCO
CROWDS = 0.01  # share of the annotations, as in COCO
SIDE = 640  # pixels of an image


def made_up_truth(images: int, classes: int, seed: int = 0) -> dict[str, list[dict]]:
    """A data set in COCO's format."""
    random = Random(seed)
    annotations: list[dict] = []
    for image in range(1, images + 1):
        for _ in range(random.randrange(round(2 * OBJECTS) + 1)):
            box = _box(random)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": random.randrange(classes) + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(random.random() < CROWDS),
                }
            )
    return {
        "images": [
            {"id": n, "width": SIDE, "height": SIDE, "file_name": f"{n}.jpg"}
            for n in range(1, images + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": n, "name": f"class {n}"} for n in range(1, classes + 1)],
    }


def made_up_detections(truth: dict[str, list[dict]], per_image: int, seed: int = 1) -> list[dict]:
    """In each image half are moved copies of its objects, some of another class."""
    random = Random(seed)
    classes = len(truth["categories"])
    objects: dict[Any, list[dict]] = {image["id"]: [] for image in truth["images"]}
    for annotation in truth["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    detections = []
    for image, own in objects.items():
        for number in range(per_image):
            category = truth["categories"][random.randrange(classes)]["id"]
            near = bool(own) and random.random() < 0.5
            box = _box(random)
            if near:
                source = own[number % len(own)]
                x, y, width, height = source["bbox"]
                box = [
                    x + 0.15 * random.gauss(0, 1) * width,
                    y + 0.15 * random.gauss(0, 1) * height,
                ]
                box += [side * math.exp(0.15 * random.gauss(0, 1)) for side in (width, height)]
                category = source["category_id"] if random.random() < 0.8 else category
            # Few different scores: how equal ones are ordered matters.
            score = round(random.random() ** (1 if near else 2), 3)
            detections.append(
                {"image_id": image, "category_id": category, "bbox": box, "score": score}
            )
    return detections


def _box(random: Random) -> list[float]:
    width, height = (math.exp(random.uniform(math.log(8), math.log(400))) for _ in range(2))
    return [random.uniform(0, SIDE - width), random.uniform(0, SIDE - height), width, height]


def by_pycocotools(file: str, detections: list[dict], iou_type: str = "bbox") -> dict[str, float]:
    """COCO's six APs and those of classes, from 0 to 100; NaN where undefined."""
    truth = COCO(file)
    evaluation = COCOeval(truth, truth.loadRes(detections), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    numbers = dict(zip(names, map(float, evaluation.stats), strict=False))
    for index, category in enumerate(evaluation.params.catIds):
        precisions = evaluation.eval["precision"][:, :, index, 0, -1]
        defined = precisions[precisions > -1]
        name = truth.cats[category]["name"]
        numbers[f"AP-{name}"] = float(defined.mean()) if defined.size else -1.0
    return {name: math.nan if number < 0 else 100 * number for name, number in numbers.items()}


def evaluator_of(file: str, truth: dict[str, list[dict]]) -> evaluators.CocoDetectionEvaluator:
    """This project's, for a file without image files."""
    ids = sorted(category["id"] for category in truth["categories"])
    names = {category["id"]: category["name"] for category in truth["categories"]}
    MetadataCatalog.get(dataset_name(file)).set(
        thing_classes=[names[key] for key in ids],
        thing_dataset_id_to_contiguous_id={key: index for index, key in enumerate(ids)},
    )
    return evaluators.CocoDetectionEvaluator(file)


def _timed(run: Callable[[], dict[str, float]]) -> tuple[float, dict[str, float]]:
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        numbers = run()
    return time.process_time() - start, numbers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--detections", type=int, default=100, help="of an image")
    options = parser.parse_args()
    truth = made_up_truth(options.images, options.classes)
    detections = made_up_detections(truth, options.detections)
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "truth.json"))
        Path(file).write_text(json.dumps(truth))
        copied = copy.deepcopy(detections)
        old, expected = _timed(lambda: by_pycocotools(file, copied))
        new, found = _timed(lambda: evaluator_of(file, truth).judge(detections))
    difference = max(
        abs(found[name] - value) for name, value in expected.items() if not math.isnan(value)
    )
    library = "pycocotools" if evaluators.COCOeval_faster is None else "faster-coco-eval"
    print(f"{len(truth['annotations'])} objects, {len(detections)} detections")
    print(f"pycocotools:                     {old:.1f} s")
    print(f"this project ({library}): {new:.1f} s, {old / new:.1f} times as fast")
    print(f"AP {found['AP']:.3f}, largest difference between two numbers: {difference:.2g}")


if __name__ == "__main__":
    main()
