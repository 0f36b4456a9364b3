"""Made-up masks for tests of evaluations: ellipses in boxes."""

import json
import math

import torch
from detectron2.structures import Boxes, Instances

from co_detr.data.segmentation import encoded_mask
from co_detr.modeling.postprocess import DetectedMasks
from tests.engine.tiny_detector import ComparingDetector


def ellipse(box):
    """The polygon of an ellipse that fills a box (x, y, w, h)."""
    x, y, width, height = box
    polygon = []
    for step in range(12):
        angle = math.pi * step / 6
        polygon += [
            x + width * (1 + math.cos(angle)) / 2,
            y + height * (1 + math.sin(angle)) / 2,
        ]
    return polygon


def add_masks(annotations):
    """Gives each of them the polygon of an ellipse, and its area."""
    for annotation in annotations:
        annotation["segmentation"] = [ellipse(annotation["bbox"])]
        annotation["area"] *= 0.75


def write_masks(tiny_data, change=add_masks):
    """Changes the annotations of a `TinyData`'s files."""
    for name in ("train", "val"):
        path = tiny_data.root / f"{name}.json"
        content = json.loads(path.read_text())
        change(content["annotations"])
        path.write_text(json.dumps(content))


def mask_results(detections, height, width):
    """Detections of boxes as those of masks, in COCO's result format."""
    results = []
    for detection in detections:
        encoded = encoded_mask([ellipse(detection["bbox"])], height, width)
        segmentation = encoded | {"counts": encoded["counts"].decode()}
        kept = {key: detection[key] for key in ("image_id", "category_id", "score")}
        results.append(kept | {"segmentation": segmentation})
    return results


class MaskedDetector(ComparingDetector):
    """Its masks fill their boxes but for a corner; the first class has the best masks."""

    predicts_masks = True

    def _detect(self, logits, box, sample):
        output = super()._detect(logits, box, sample)
        found = output["instances"]
        probabilities = torch.ones(len(found), 28, 28, device=box.device)
        probabilities[:, 14:, 14:] = 0
        boxes = found.pred_boxes.tensor.clone()
        found.pred_masks = DetectedMasks(probabilities, boxes, found.image_size)
        found.mask_scores = found.scores / (1 + found.pred_classes)
        return output


def instances_of(annotations, size, classes):
    """Ground truth as detections of a score of 1, whose masks fill their boxes.

    Args:
        classes: category ids in the order of the model's classes.
    """
    boxes = torch.tensor([annotation["bbox"] for annotation in annotations]).float().reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    numbers = [classes.index(annotation["category_id"]) for annotation in annotations]
    return Instances(
        size,
        pred_boxes=Boxes(boxes),
        scores=torch.ones(len(boxes)),
        pred_classes=torch.tensor(numbers, dtype=torch.long),
        pred_masks=DetectedMasks(torch.ones(len(boxes), 28, 28), boxes.clone(), size),
    )
