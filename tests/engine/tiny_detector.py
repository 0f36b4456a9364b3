"""A detector of a few hundred parameters: tests of the engine need no real one."""

import json
import os
import signal

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch import nn

from co_detr.structures import StepCounts


class TinyBackbone(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 5, stride=4)
        self.res2 = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return F.relu(self.res2(F.relu(self.stem(image)))).mean((2, 3))


class TinyDetector(nn.Module):
    """One box per class and image. All losses are means over images."""

    def __init__(self, num_classes: int, channels: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.backbone = TinyBackbone(channels)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(channels, num_classes)
        self.locate = nn.Linear(channels, 4)
        self.num_classes = num_classes

    def forward(self, batched_inputs):
        images = [sample["image"].to(self.locate.weight)[None] / 255 for sample in batched_inputs]
        features = torch.cat([self.backbone(image) for image in images])
        logits = self.classify(self.dropout(features))  # (B, num_classes)
        boxes = self.locate(features).sigmoid()  # (B, 4) normalized cxcywh
        if not self.training:
            return [self._detect(*item) for item in zip(logits, boxes, batched_inputs, strict=True)]
        return self._losses(logits, boxes, batched_inputs)

    def _losses(self, logits, boxes, batched_inputs):
        present = torch.zeros_like(logits)
        targets = torch.zeros_like(boxes)
        for i, sample in enumerate(batched_inputs):
            instances = sample["instances"].to(logits.device)
            present[i, instances.gt_classes] = 1
            if len(instances):
                height, width = instances.image_size
                scale = boxes.new_tensor([width, height, width, height])
                targets[i] = (instances.gt_boxes.tensor / scale).mean(0)
        return {
            "matching.loss_cls": F.binary_cross_entropy_with_logits(logits, present),
            "roi.loss_bbox": F.l1_loss(boxes, targets),
        }

    def _detect(self, logits, box, sample):
        width, height = sample["width"], sample["height"]
        xyxy = torch.cat([box[:2] - box[2:] / 2, box[:2] + box[2:] / 2])
        result = Instances((height, width))
        scale = box.new_tensor([width, height, width, height])
        result.pred_boxes = Boxes((xyxy * scale).expand(self.num_classes, 4).clone())
        result.scores = logits.sigmoid()
        result.pred_classes = torch.arange(self.num_classes, device=logits.device)
        return {"instances": result}


class CountingDetector(TinyDetector):
    """Its class loss is divided by the number of objects, at least 1, as those of Co-DETR are."""

    def count(self, batched_inputs, with_heads):
        return StepCounts([len(sample["instances"]) for sample in batched_inputs])

    def forward(self, batched_inputs, counts=None):
        self.counts = counts
        return super().forward(batched_inputs)

    def _losses(self, logits, boxes, batched_inputs):
        losses, number = super()._losses(logits, boxes, batched_inputs), len(batched_inputs)
        counts = self.counts or self.count(batched_inputs, with_heads=False)
        weights = {
            "matching.loss_cls": number / max(1, sum(counts.num_truths)),
            "roi.loss_bbox": counts.share(number),
        }
        return {name: value * weights[name] for name, value in losses.items()}


class ComparingDetector(TinyDetector):
    """Also tells what a second detector finds, in the same pass: the boxes one pixel further."""

    compared = ("roi",)
    shift = 1.0

    def _detect(self, logits, box, sample):
        output = super()._detect(logits, box, sample)
        found = output["instances"]
        second = Instances(found.image_size, **found.get_fields())
        second.pred_boxes = Boxes(found.pred_boxes.tensor + self.shift)
        return output | {"instances_roi": second}


class NaNDetector(TinyDetector):
    """Its loss is NaN from the third forward pass in training on."""

    passes = 0

    def _losses(self, logits, boxes, batched_inputs):
        losses = super()._losses(logits, boxes, batched_inputs)
        self.passes += 1
        if self.passes >= 3:
            losses["roi.loss_bbox"] = losses["roi.loss_bbox"] * float("nan")
        return losses


class DyingDetector(TinyDetector):
    """Ends the second of two processes in its third forward pass in training."""

    passes = 0

    def _losses(self, logits, boxes, batched_inputs):
        self.passes += 1
        if self.passes == 3 and comm.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._losses(logits, boxes, batched_inputs)


class GroundTruthDetector(nn.Module):
    """Base of detectors that know the ground truth, which the val mapper drops: they read the
    file."""

    def __init__(self, num_classes, annotation_file):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        with open(annotation_file) as file:
            self.annotations = json.load(file)["annotations"]

    def forward(self, batched_inputs):
        return [{"instances": self.detect(sample)} for sample in batched_inputs]

    def annotations_of(self, sample):
        return [
            annotation
            for annotation in self.annotations
            if annotation["image_id"] == sample["image_id"]
        ]

    def detect(self, sample):
        """Detections of one image in output resolution."""
        raise NotImplementedError
