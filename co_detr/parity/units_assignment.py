"""Checks of anchors and of everything that assigns ground truths."""

from __future__ import annotations

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou

from co_detr.modeling.auxiliary import ATSSAssigner, ATSSHead
from co_detr.modeling.auxiliary.dense import InsideCells
from co_detr.modeling.boxes import normalise_boxes
from co_detr.modeling.matching import HungarianAssigner, MatchingProblem, solve_assignment
from co_detr.parity.differences import RPN_LOW_QUALITY
from co_detr.parity.rpn_rule import RPNAssignment, match, rpn_matcher
from co_detr.parity.unit import FLOAT32, Unit, level_shapes
from co_detr.structures import GroundTruth, Predictions

OCTAVES, RATIOS = 3, (0.5, 1.0, 2.0)


def linear_sum_assignment(unit: Unit) -> None:
    matched = torch.from_numpy(solve_assignment(unit["cost"][None].numpy()))[0]
    rows = (matched >= 0).nonzero().squeeze(1)
    unit.exact("row_ind", rows)
    unit.exact("col_ind", matched[rows])


def hungarian_assigner(unit: Unit) -> None:
    """Cost terms one by one, then the assignment as targets."""
    logits, size = unit["cls_logits"], tuple(unit["image_hw"])
    truth = GroundTruth(
        unit["gt_labels"], normalise_boxes(unit["gt_boxes_xyxy"], size), image_size=size
    )
    predictions = Predictions(logits[None, None], unit["boxes_cxcywh_norm"][None, None])
    assigner, off = HungarianAssigner(), dict(class_weight=0.0, bbox_weight=0.0, giou_weight=0.0)
    for key, weight in (
        ("cost_cls", "class_weight"),
        ("cost_l1", "bbox_weight"),
        ("cost_giou", "giou_weight"),
    ):
        if unit.has(key):  # the reference computes none for an image without ground truth
            term = HungarianAssigner(**{**off, weight: getattr(assigner, weight)})
            unit.close(key, term.cost(predictions, 0, truth)[0])

    num_classes = logits.shape[1]
    (targets,) = assigner([MatchingProblem(predictions, [truth], num_classes)])
    labels, boxes = targets.labels[0, 0], targets.boxes[0, 0]
    is_matched = labels < num_classes
    unit.exact("labels", torch.where(is_matched, labels, -1))
    # Targets name no index; the boxes of the entries differ from each other, so they tell.
    numbers = torch.arange(1, len(truth.boxes) + 1)
    same = (boxes[:, None] == truth.boxes[None]).all(-1) & is_matched[:, None]
    unit.exact("gt_inds", (same * numbers).sum(1))


def anchors(unit: Unit) -> None:
    """RPN anchors lie ratio-major in the reference, size-major in Detectron2: permuted here."""
    kind, strides = unit["kind"], unit["strides"]
    maps = [torch.zeros(1, 1, *shape) for shape in unit["featmap_sizes_hw"]]
    if kind == "atss":
        generator = ATSSHead(
            num_classes=1,
            embed_dim=32,
            in_features=[str(stride) for stride in strides],
            strides=strides,
            assigner=ATSSAssigner(),
        ).anchor_generator
    else:
        generator = DefaultAnchorGenerator(
            sizes=[[4 * stride * 2 ** (i / OCTAVES) for i in range(OCTAVES)] for stride in strides],
            aspect_ratios=list(RATIOS),
            strides=strides,
            offset=0.0,
        )
    order, note = torch.arange(generator.num_anchors[0]), ""
    if kind == "rpn":
        note = "ratio-major in the reference, ours permuted"
        order = order.view(OCTAVES, len(RATIOS)).t().flatten()
    unit.close("base_anchors", [cell[order] for cell in generator.cell_anchors], note=note)
    grid = [boxes.tensor.view(-1, len(order), 4)[:, order] for boxes in generator(maps)]
    unit.close("grid_anchors", [boxes.flatten(0, 1) for boxes in grid], note=note)


def valid_flags(unit: Unit) -> None:
    size = tuple(unit["pad_shape_hw"])
    levels = zip(level_shapes(unit["featmap_sizes_hw"]), unit["strides"], strict=True)
    flags = [InsideCells.of(torch.zeros(shape), stride, size).mask() for shape, stride in levels]
    unit.exact("flags", flags)


def atss_assigner(unit: Unit) -> None:
    """Our assigner returns no overlaps; they are recomputed for the pairs that it made."""
    _ = unit["name"]
    boxes, gt_boxes, gt_labels = unit["anchors"], unit["gt_boxes_xyxy"], unit["gt_labels"]
    assigned = ATSSAssigner()(list(boxes.split(unit["num_level_anchors"])), gt_boxes)
    positive = assigned >= 0
    unit.exact("gt_inds", assigned + 1)
    labels = torch.full_like(assigned, -1)
    labels[positive] = gt_labels[assigned[positive]]
    unit.exact("labels", labels)
    # The reference's marks: -1e8 for an anchor without a ground truth, 0 in an empty image.
    overlaps = boxes.new_full((len(boxes),), -1e8 if len(gt_boxes) else 0.0)
    pairs = pairwise_iou(Boxes(boxes), Boxes(gt_boxes))[positive]
    overlaps[positive] = pairs.gather(1, assigned[positive, None]).squeeze(1)
    # Absolute, or the marks would allow anything.
    unit.close("max_overlaps", overlaps, rtol=0, atol=FLOAT32)


def max_iou_assigner(unit: Unit) -> None:
    """Detectron2's matchers; the one for RPN anchors has another low-quality rule by design."""
    kind, _ = unit["kind"], unit["name"]
    overlaps = pairwise_iou(Boxes(unit["gt_boxes_xyxy"]), Boxes(unit["boxes"]))  # (G, R)
    best = overlaps.amax(0) if len(overlaps) else overlaps.new_zeros(overlaps.shape[1])
    unit.close("max_overlaps", best)
    if kind == "rcnn":
        matcher = Matcher([0.5], [0, 1], allow_low_quality_matches=False)
        unit.exact("gt_inds", match(matcher, overlaps))
        return
    matcher, expected = rpn_matcher(allow_low_quality=True), unit.expected("gt_inds")
    everywhere = torch.ones(overlaps.shape[1], dtype=torch.bool)
    found = RPNAssignment.compare(matcher, overlaps, expected, everywhere)
    if found.differing:
        unit.known("gt_inds", RPN_LOW_QUALITY, found.explained, f"{found.differing} anchors")
    else:
        unit.exact("gt_inds", match(matcher, overlaps))
