"""RetinaNet, FCOS, PAA and GFL: what their losses are, what they assign and what they give."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from torchvision.ops import box_iou, generalized_box_iou

from co_detr.modeling.auxiliary import DeltaCode, DistanceCode, DistributionCode
from co_detr.modeling.auxiliary.dense import DensePredictions
from co_detr.modeling.auxiliary.dense_criteria import distribution_focal_loss
from tests.modeling.builders import (
    NUM_CLASSES,
    make_batch,
    make_instances,
    random_boxes,
    randomise,
    tiny_model,
)

NEW = ["retinanet", "fcos", "paa", "gfl"]
SIZES = [(96, 128), (64, 80)]  # the second one is padded
BOXES = torch.tensor([[10.0, 13.0, 47.0, 58.0], [60.0, 20.0, 118.0, 90.0]])
GTS = [
    make_instances(BOXES, torch.tensor([2, 0]), SIZES[0]),
    make_instances(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), SIZES[1]),
]


@pytest.fixture(scope="module")
def heads():
    model = tiny_model(6)
    randomise(model)
    return model.auxiliary.heads


def make_maps(head, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 32, -(-96 // stride), -(-128 // stride)) for stride in head.strides]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def run(head, gts=GTS):
    """Anchors ``(R, 4)``, predictions and final targets."""
    maps = make_maps(head)
    anchors = head.anchors(maps)
    with torch.no_grad():
        predictions = head.predict(maps)
    targets = head.assign(anchors, maps, SIZES, gts)
    return torch.cat(anchors), predictions, head.refine(targets, predictions, anchors)


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
    anchors, predictions, targets = run(head)
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
    anchors, predictions, targets = run(head)
    losses = head.losses(predictions, anchors, targets)
    rows, matched, decoded, boxes = positives(head, anchors, predictions, targets)
    number = len(rows) + 1
    assert losses["loss_cls"].item() == approx(focal_sum(predictions.logits, targets) / number)
    points = (matched[:, :2] + matched[:, 2:]) / 2
    (left, top), (right, bottom) = (points - boxes[:, :2]).T, (boxes[:, 2:] - points).T
    centreness = torch.sqrt(
        torch.minimum(left, right)
        / torch.maximum(left, right)
        * torch.minimum(top, bottom)
        / torch.maximum(top, bottom)
    )
    giou = by_pairs(generalized_box_iou, decoded, boxes)
    expected = ((1 - giou) * centreness).sum() / centreness.sum().clamp(min=1)
    assert losses["loss_bbox"].item() == approx(expected)
    entropy = F.binary_cross_entropy(predictions.quality[0, rows].sigmoid(), centreness)
    assert losses["loss_centreness"].item() == approx(entropy * len(rows) / number)


def test_losses_of_paa(heads):
    head = heads.paa
    anchors, predictions, targets = run(head)
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
    anchors, predictions, targets = run(head)
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

    class Targets:
        labels = label.view(1, 1)
        inside = torch.ones(1, 1, dtype=torch.bool)

    return Targets


@pytest.mark.parametrize("name", NEW)
def test_padding_is_neither_positive_nor_negative(heads, name):
    head = heads[name]
    # The second image's box touches its border, so that anchors beyond would do as well.
    second = make_instances(torch.tensor([[30.0, 20.0, 80.0, 64.0]]), torch.tensor([1]), SIZES[1])
    anchors, predictions, targets = run(head, [GTS[0], second])
    inside = targets.inside
    assert inside[0].all() and not inside[1].all() and targets.positive(NUM_CLASSES)[1].any()
    assert not targets.positive(NUM_CLASSES)[~inside].any()
    before = head.losses(predictions, anchors, targets)
    for values in (predictions.logits, predictions.deltas, predictions.quality):
        if values is not None:
            values[~inside] = 50.0
    after = head.losses(predictions, anchors, targets)
    assert {k: v.item() for k, v in before.items()} == {k: v.item() for k, v in after.items()}


@pytest.mark.parametrize("name", NEW)
def test_candidates(heads, name):
    head = heads[name]
    maps = [each.requires_grad_() for each in make_maps(head)]
    images = ImageList(torch.zeros(2, 3, 96, 128), SIZES)
    output = head(images, dict(zip(head.in_features, maps, strict=True)), GTS)
    first, empty = output.candidates.instances
    anchors = torch.cat(head.anchors(maps))
    positive = (first.gt_classes >= 0) & (first.gt_classes < NUM_CLASSES)
    for label, box in zip(first.gt_classes[positive], first.gt_boxes.tensor[positive], strict=True):
        (truth,) = (GTS[0].gt_boxes.tensor == box).all(1).nonzero().flatten()
        assert GTS[0].gt_classes[truth] == label
    assert torch.equal(first.proposal_boxes.tensor, anchors)
    # Neither a positive nor a background candidate lies in the padding.
    assert set(empty.gt_classes.tolist()) == {NUM_CLASSES, -1}
    assert empty.proposal_boxes.tensor[empty.gt_classes == -1].abs().sum() == 0

    per_cell = 9 if name == "retinanet" else 1
    width = maps[0].shape[-1]
    cell = 2 * width + 3  # row 2, column 3 of the finest level
    first_of_next = per_cell * maps[0].shape[-2] * width
    indices = torch.tensor([cell * per_cell, cell * per_cell + per_cell - 1, first_of_next])
    rows = output.candidates.gather_features(1, indices)
    assert torch.equal(rows[0], maps[0][1, :, 2, 3]) and torch.equal(rows[0], rows[1])
    assert torch.equal(rows[2], maps[1][1, :, 0, 0])
    centre = 2.5 if name == "fcos" else 2.0, 3.5 if name == "fcos" else 3.0
    box = anchors[indices[0]]
    assert ((box[1] + box[3]) / 2, (box[0] + box[2]) / 2) == (8 * centre[0], 8 * centre[1])


@pytest.mark.parametrize("name", NEW)
def test_rows_of_predictions_are_those_of_anchors(heads, name):
    """A constant map gives every cell the same outputs, one row for each of its anchors."""
    head = heads[name]
    maps = [torch.ones(1, 32, 5, 7) for _ in head.strides]
    with torch.no_grad():
        predictions = head.predict(maps)
    count = head.num_anchors
    middle = 2 * 7 * count + 3 * count  # away from the border, whose outputs see zeros
    for values in (predictions.logits, predictions.deltas):
        own, right = values[0, middle : middle + count], values[0, middle + count :][:count]
        torch.testing.assert_close(own, right)
        assert values.shape[1] == count * 35 * len(head.strides)
        if count > 1:
            assert (own[0] - own[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "code", [DeltaCode(), DeltaCode((10.0, 10.0, 5.0, 5.0)), DistanceCode()], ids=str
)
def test_codes_there_and_back(code):
    boxes = random_boxes(20, (96, 128), torch.Generator().manual_seed(0))
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 + 2
    anchors = torch.cat([centres - 8, centres + 8], 1)
    torch.testing.assert_close(code.decode(code.encode(boxes, anchors), anchors), boxes)


def test_distribution_code():
    code = DistributionCode(max_distance=4, anchor_scale=2.0)
    anchor = torch.tensor([[0.0, 0.0, 32.0, 32.0]])  # stride 16
    logits = torch.full((1, 4, 5), -1e4)
    for side, distance in enumerate((0, 1, 2, 4)):
        logits[0, side, distance] = 0.0
    logits[0, 2, 3] = 0.0  # half of 2, half of 3
    box = code.decode(logits.flatten(1), anchor)
    assert box.tolist() == [[16.0, 0.0, 16 + 2.5 * 16, 16 + 4 * 16]]
    torch.testing.assert_close(code.encode(box, anchor), torch.tensor([[0.0, 1.0, 2.5, 4.0]]))
    assert code.decode(logits.flatten(1)[:0], anchor[:0]).shape == (0, 4)


def test_distribution_focal_loss_is_least_at_the_two_bins():
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0]).expand(5, 4)
    log_shares = logits[0].log_softmax(-1)
    distances = torch.tensor([1.0, 1.25, 3.0, 7.0, -1.0])
    expected = [1, None, 3, 3, 0]
    losses = distribution_focal_loss(logits, distances)
    for loss, bin_ in zip(losses, expected, strict=True):
        between = 0.75 * log_shares[1] + 0.25 * log_shares[2]
        torch.testing.assert_close(loss, -(between if bin_ is None else log_shares[bin_]))


@pytest.mark.parametrize("name", NEW)
def test_each_detects_alone(heads, name):
    model = tiny_model(6, [f"model.evaluate_with={name}"]).eval()
    with torch.no_grad():
        detections = model(make_batch())
    for found in (each["instances"] for each in detections):
        assert 0 < len(found) <= 100
        assert (found.scores.diff() <= 0).all() and (found.scores <= 1).all()
        assert (found.pred_classes < NUM_CLASSES).all()


def test_scores_of_paa_are_geometric_means(heads):
    scores = heads.paa.rescore(torch.tensor([0.25]), torch.tensor([0.64]))
    assert scores.item() == pytest.approx(0.4)
    scores = heads.fcos.rescore(torch.tensor([0.25]), torch.tensor([0.64]))
    assert scores.item() == pytest.approx(0.16)
