"""Detections of an exported file beside those of the model that it came from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from scipy.optimize import linear_sum_assignment

from co_detr.data.images import ImageSource
from co_detr.data.mapper import in_format
from co_detr.export.graph import Detections, num_pairs
from co_detr.export.predictor import ExportedPredictor
from co_detr.modeling import CoDETR
from co_detr.modeling.boxes import cxcywh_to_xyxy, size_factor
from co_detr.modeling.postprocess import choose_pairs
from co_detr.tools.predict.predictor import Sample

SCORE_TOLERANCE = 1e-3
BOX_TOLERANCE = 0.5  # pixels of the network input

_APART = 1e9  # cost of a pair of two classes, or of a NaN

Result = TypeVar("Result")


@dataclass(frozen=True)
class Difference:
    """Two lists of detections of one image.

    Attributes:
        compared: pairs of detections, one of each list.
        at_cut: detections of either list without a partner, whose score lies within the tolerance
            of the lowest one: noise decides which of them are among the best.
        lost: other detections without a partner.
        score, box: largest differences of all pairs, of scores and of box sides in pixels.
    """

    compared: int
    at_cut: int
    lost: int
    score: float
    box: float

    @property
    def is_small(self) -> bool:
        return (
            self.compared > self.at_cut
            and self.lost == 0
            and self.score <= SCORE_TOLERANCE
            and self.box <= BOX_TOLERANCE
        )


@dataclass(frozen=True)
class Check:
    """One image: the difference, the network input (height, width), seconds of both."""

    difference: Difference
    input_size: tuple[int, int]
    model_seconds: float
    file_seconds: float


def check_image(
    predictor: ExportedPredictor, model: CoDETR, image_format: str, image: ImageSource
) -> Check:
    """Runs the file and the model on the same network input.

    The model takes its own way to its own normalisation, padding and kernels. Where the file pads
    images to a fixed size, the model gets the same padding: what padding does to detections is no
    difference of the file.
    """
    sample = predictor.prepare(image)
    size = predictor.description.padded(*sample.image.shape[-2:])
    expected, model_seconds = _timed(lambda: _detect(model, image_format, sample, size))
    found, file_seconds = _timed(lambda: predictor.run(sample))
    return Check(difference(expected, found), size, model_seconds, file_seconds)


def _timed(call: Callable[[], Result]) -> tuple[Result, float]:
    start = time.perf_counter()
    return call(), time.perf_counter() - start


@torch.no_grad()
def _detect(
    model: CoDETR, image_format: str, sample: Sample, padded: tuple[int, int]
) -> Detections:
    pixels = in_format(sample.image.permute(1, 2, 0).numpy(), image_format)
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    batch = model.preprocess([{"image": image}])
    height, width = batch.tensor.shape[-2:]
    tensor = F.pad(batch.tensor, (0, padded[1] - width, 0, padded[0] - height))
    logits, boxes, sizes = model.predict(ImageList(tensor, batch.image_sizes))
    pairs = choose_pairs(logits, boxes, num_pairs(model))
    factor = size_factor(sizes[0], boxes)
    absolute = torch.minimum((cxcywh_to_xyxy(pairs.boxes) * factor).clamp(min=0), factor)
    return Detections(absolute, pairs.scores, pairs.labels)


def difference(expected: Detections, found: Detections) -> Difference:
    """Compares detections of a batch of one.

    Order means nothing: detections of nearly equal scores change places. Every detection is paired
    with one of the same class so that the sum of all differences, in units of the tolerances, is
    smallest.
    """
    lists = (expected, found)
    scores = [each.scores[0].double() for each in lists]
    boxes = [each.boxes[0].double() for each in lists]
    labels = [each.labels[0] for each in lists]
    score_gap = (scores[0][:, None] - scores[1][None]).abs()
    box_gap = (boxes[0][:, None] - boxes[1][None]).abs().amax(-1)
    cost = score_gap / SCORE_TOLERANCE + box_gap / BOX_TOLERANCE
    cost[labels[0][:, None] != labels[1][None]] = _APART
    cost = cost.nan_to_num(nan=_APART)
    rows, columns = (torch.from_numpy(index) for index in linear_sum_assignment(cost.numpy()))
    near_cut = [each <= each.min() + SCORE_TOLERANCE for each in scores]
    apart = cost[rows, columns] >= _APART
    far = (score_gap[rows, columns] > SCORE_TOLERANCE) | (box_gap[rows, columns] > BOX_TOLERANCE)
    # A pair that does not fit, both at the cut: one fell out of each list.
    swapped = far & near_cut[0][rows] & near_cut[1][columns]
    paired = ~(apart | swapped)
    alone = torch.cat([near_cut[0][rows[~paired]], near_cut[1][columns[~paired]]])
    rows, columns = rows[paired], columns[paired]
    return Difference(
        compared=len(rows),
        at_cut=int(alone.sum()),
        lost=int((~alone).sum()) + abs(len(scores[0]) - len(scores[1])),
        score=float(score_gap[rows, columns].max()) if len(rows) else 0.0,
        box=float(box_gap[rows, columns].max()) if len(rows) else 0.0,
    )
