"""Losses of RetinaNet, FCOS, PAA and GFL, written out from their papers."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_iou, generalized_box_iou

from co_detr.modeling.auxiliary.dense_losses import DensePredictions, DenseTargets
from tests.modeling.builders import NUM_CLASSES
from tests.modeling.dense_cases import GTS, SIZES, make_maps, run_dense_head


def positives(head, anchors, predictions, targets):
    """Of the first image: rows, anchors, decoded boxes and ground truths, one by one."""
    rows = (targets.labels[0] >= 0) & (targets.labels[0] < NUM_CLASSES)
    rows = rows.nonzero().squeeze(1)
    assert len(rows) >= 2
    decoded = head.box_code.decode(predictions.deltas[0, rows], anchors[rows])
    return rows, anchors[rows], decoded, targets.boxes[0, rows]


def by_pairs(function, first, second):
    pairs = zip(first, second, strict=True)
    return torch.stack([function(one[None], other[None])[0, 0] for one, other in pairs])


def focal_sum(logits, targets):
    """Focal loss of all anchors that count, written out in float64."""
    counts = targets.inside & (targets.labels >= 0)
    labels = targets.labels.clamp(min=0)
    target = F.one_hot(labels, NUM_CLASSES + 1)[..., :NUM_CLASSES].double()
    p = logits.double().sigmoid()
    terms = 0.25 * (1 - p) ** 2 * -p.log() * target + 0.75 * p**2 * -(1 - p).log() * (1 - target)
    return (terms.sum(-1) * counts).sum().item()


def approx(value):
    return pytest.approx(float(value), rel=1e-4)


def test_losses_of_retinanet(heads):
    head = heads.retinanet
    anchors, predictions, targets = run_dense_head(head)
    losses = head.losses(predictions, anchors, targets)
    rows, matched, _, boxes = positives(head, anchors, predictions, targets)
    number = len(rows) + 1  # an image without positives counts as one
    assert (targets.labels == -1).any()
    assert losses["loss_cls"].item() == approx(focal_sum(predictions.logits, targets) / number)
    size, goal = matched[:, 2:] - matched[:, :2], boxes[:, 2:] - boxes[:, :2]
    shift = ((boxes[:, :2] + boxes[:, 2:]) - (matched[:, :2] + matched[:, 2:])) / 2 / size
    error = (predictions.deltas[0, rows] - torch.cat([shift, (goal / size).log()], 1)).abs()
    smooth = torch.where(error < 0.1, error**2 / 0.2, error - 0.05)
    assert losses["loss_bbox"].item() == approx(smooth.sum() / number)


def test_losses_of_fcos(heads):
    head = heads.fcos
    anchors, predictions, targets = run_dense_head(head)
    losses = head.losses(predictions, anchors, targets)
    rows, matched, decoded, boxes = positives(head, anchors, predictions, targets)
    number = len(rows) + 1
    assert losses["loss_cls"].item() == approx(focal_sum(predictions.logits, targets) / number)
    points = (matched[:, :2] + matched[:, 2:]) / 2
    (left, top), (right, bottom) = (points - boxes[:, :2]).T, (boxes[:, 2:] - points).T
    centerness = torch.sqrt(
        torch.minimum(left, right)
        / torch.maximum(left, right)
        * torch.minimum(top, bottom)
        / torch.maximum(top, bottom)
    )
    giou = by_pairs(generalized_box_iou, decoded, boxes)
    expected = ((1 - giou) * centerness).sum() / centerness.sum().clamp(min=1)
    assert losses["loss_bbox"].item() == approx(expected)
    entropy = F.binary_cross_entropy(predictions.quality[0, rows].sigmoid(), centerness)
    assert losses["loss_centerness"].item() == approx(entropy * len(rows) / number)


def test_losses_of_paa(heads):
    head = heads.paa
    anchors, predictions, targets = run_dense_head(head)
    losses = head.losses(predictions, anchors, targets)
    rows, _, decoded, boxes = positives(head, anchors, predictions, targets)
    number = len(rows) + 1
    assert losses["loss_cls"].item() == approx(focal_sum(predictions.logits, targets) / number)
    quality = by_pairs(box_iou, decoded, boxes)
    giou = by_pairs(generalized_box_iou, decoded, boxes)
    expected = 1.3 * ((1 - giou) * quality).sum() / quality.sum().clamp(min=1)
    assert losses["loss_bbox"].item() == approx(expected)
    entropy = F.binary_cross_entropy(predictions.quality[0, rows].sigmoid(), quality)
    assert losses["loss_iou"].item() == approx(0.5 * entropy * len(rows) / number)


def test_losses_of_gfl(heads):
    head = heads.gfl
    anchors, predictions, targets = run_dense_head(head)
    predictions = DensePredictions(predictions.logits + 4, predictions.deltas)  # scores above 0.01
    losses = head.losses(predictions, anchors, targets)
    rows, matched, decoded, boxes = positives(head, anchors, predictions, targets)
    quality = by_pairs(box_iou, decoded, boxes)
    goal = torch.zeros(*targets.labels.shape, NUM_CLASSES)
    for row, value in zip(rows, quality, strict=True):
        goal[0, row, targets.labels[0, row]] = value
    p = predictions.logits.sigmoid()
    terms = (goal - p).abs() ** 2 * F.binary_cross_entropy(p, goal, reduction="none")
    expected = (terms.sum(-1) * targets.inside).sum() / (len(rows) + 1)
    assert losses["loss_cls"].item() == approx(expected)

    weights = p[0, rows].max(-1).values
    assert weights.sum() > 1
    giou = by_pairs(generalized_box_iou, decoded, boxes)
    expected = 2 * ((1 - giou) * weights).sum() / weights.sum()
    assert losses["loss_bbox"].item() == approx(expected)
    by_side = 0.0
    strides = (matched[:, 2] - matched[:, 0]) / 4  # the anchors are four strides wide
    for row, anchor, box, weight, stride in zip(
        rows, matched, boxes, weights, strides, strict=True
    ):
        x, y = (anchor[:2] + anchor[2:]) / 2
        shares = predictions.deltas[0, row].view(4, 17).softmax(-1)
        for side, pixels in enumerate((x - box[0], y - box[1], box[2] - x, box[3] - y)):
            distance = (pixels / stride).item()
            left = int(distance)
            near, far = shares[side, left].log(), shares[side, left + 1].log()
            by_side -= weight * ((left + 1 - distance) * near + (distance - left) * far) / 4
    assert losses["loss_dfl"].item() == approx(0.25 * by_side / weights.sum())


def test_positives_of_paa_are_candidates_of_low_loss(heads):
    head = heads.paa
    maps = make_maps(head)
    anchors = head.anchors(maps)
    with torch.no_grad():
        predictions = head.predict(maps)
    candidates = head.assign(anchors, maps, SIZES, GTS)
    final = head.refine(candidates, predictions, anchors)
    before, after = candidates.positive(NUM_CLASSES), final.positive(NUM_CLASSES)
    assert (after <= before).all() and 0 < after.sum() < before.sum()
    assert (final.labels[before & ~after] == NUM_CLASSES).all()
    assert (final.boxes[before & ~after] == 0).all()
    costs = torch.full(before.shape, float("nan"))
    costs[before] = head.criterion.costs(predictions, torch.cat(anchors), candidates, head.box_code)
    logits = predictions.logits[before]
    row = before[0].nonzero()[3].item()
    alone = focal_sum(logits[3:4, None], _one(candidates.labels[0, row]))
    box = head.box_code.decode(predictions.deltas[0, row, None], torch.cat(anchors)[row, None])
    giou = generalized_box_iou(box, candidates.boxes[0, row, None])
    assert costs[0, row].item() == approx(alone + 1.3 * (1 - giou))
    for truth in range(2):
        mine = before & (candidates.truths == truth)
        assert costs[mine & after].mean() < costs[mine & ~after].mean()


def _one(label):
    """Targets of a single anchor."""
    inside = torch.ones(1, 1, dtype=torch.bool)
    return DenseTargets(label.view(1, 1), torch.zeros(1, 1, 4), inside, torch.zeros(1, 1))
