"""A small correct data set that the tests of the preflight damage."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from co_detr.data.coco import load_coco
from co_detr.data.coco_classes import align_classes, class_names
from co_detr.data.preflight import PreflightSettings, SplitFiles, preflight
from co_detr.engine.evaluators import CocoDetectionEvaluator
from co_detr.errors import DataError

WIDTH, HEIGHT = 48, 40
NAMES = ("cell", "disc", "plate")


class Data:
    """A correct set of 4 train and 3 val images, as dicts that a test may damage before `write`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        rng = np.random.default_rng(0)
        self.train, self.val = self._split("train", 4, rng), self._split("val", 3, rng)

    def _split(self, name, count, rng):
        (self.root / name).mkdir()
        images, annotations = [], []
        for i in range(count):
            pixels = rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.root / name / f"{i}.jpg")
            images.append({"id": i, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT})
            for j in range(3):
                box = [2 + 3 * i, 1 + 12 * j, 14 + j, 11]
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": i, "category_id": j + 1, "bbox": box}
                )
        categories = [{"id": j + 1, "name": name} for j, name in enumerate(NAMES)]
        return {"images": images, "annotations": annotations, "categories": categories}

    def write(self, encoding="utf-8"):
        for name, content in (("train", self.train), ("val", self.val)):
            text = json.dumps(content, ensure_ascii=encoding == "utf-8")
            (self.root / f"{name}.json").write_bytes(text.encode(encoding))

    def files(self, split):
        return SplitFiles(split, str(self.root / f"{split}.json"), str(self.root / split))

    def report(self, invalid_boxes="skip", **settings):
        splits = [self.files("train"), self.files("val")]
        return preflight(splits, PreflightSettings(**settings), invalid_boxes)

    def error(self, **settings):
        """The sentence that stops the run."""
        with pytest.raises(DataError) as caught:
            self.report(**settings).raise_on_errors()
        sentence = str(caught.value)
        assert "\n" not in sentence and sentence.endswith(".")
        return sentence

    def warnings(self, **settings):
        """(count, defect) of what does not stop the run."""
        report = self.report(**settings)
        report.raise_on_errors()
        assert all(finding.what in report.text() for finding in report.findings)
        return [(finding.count, finding.what) for finding in report.findings]

    def perfect_ap(self):
        """AP of a model that detects every usable box of val, with train's class numbers."""
        train, val = self.files("train"), self.files("val")
        load_coco(train.annotations, train.images, invalid_boxes="skip")
        load_coco(val.annotations, val.images, invalid_boxes="skip")
        names = class_names(train.annotations)
        align_classes(val.annotations, names)
        evaluator = CocoDetectionEvaluator(val.annotations, str(self.root))
        evaluator.reset()
        ids = {entry["id"]: names.index(entry["name"]) for entry in self.val["categories"]}
        for image in self.val["images"]:
            mine = [
                a
                for a in self.val["annotations"]
                if a["image_id"] == image["id"] and all(v > 0 for v in a["bbox"][2:])
            ]
            detections = Instances((image["height"], image["width"]))
            boxes = torch.tensor([a["bbox"] for a in mine], dtype=torch.float32).reshape(-1, 4)
            detections.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
            detections.scores = torch.ones(len(mine))
            detections.pred_classes = torch.tensor([ids[a["category_id"]] for a in mine])
            # Detections of classes that val does not know must neither count nor be written.
            others = detections[:1]
            for number in set(range(len(names))) - set(ids.values()):
                others.pred_classes = torch.tensor([number])
                detections = Instances.cat([detections, others])
            evaluator.process([{"image_id": image["id"]}], [{"instances": detections}])
        metrics = evaluator.evaluate()["bbox"]
        written = json.loads((self.root / "coco_instances_results.json").read_text())
        assert {detection["category_id"] for detection in written} <= ids.keys()
        return metrics
