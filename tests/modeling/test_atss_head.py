"""The ATSS head: who is assigned, what the losses are divided by, what candidates it gives."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, ImageList, Instances
from torchvision.ops import generalized_box_iou

from co_detr.errors import ConfigError
from co_detr.modeling.auxiliary import ATSSAssigner, ATSSHead
from co_detr.modeling.auxiliary.dense_head import InsideCells
from co_detr.modeling.auxiliary.dense_losses import (
    DensePredictions,
    DenseTargets,
    centerness_target,
    decode_deltas,
)
from tests.device import DEVICE
from tests.modeling.builders import make_instances

CLASSES = 3
SIZES = [(64, 96), (48, 64)]  # the second one is padded
GTS = [
    make_instances(torch.tensor([[6.0, 9.0, 39.0, 41.0]]), torch.tensor([2]), SIZES[0]),
    make_instances(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), SIZES[1]),
]


def make_head():
    torch.manual_seed(0)
    return ATSSHead(
        num_classes=CLASSES,
        embed_dim=8,
        in_features=["p3", "p4"],
        strides=[8, 16],
        assigner=ATSSAssigner(topk=9),
        anchor_scale=4.0,
        num_groups=2,
    ).to(DEVICE)


def make_maps(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 8, *shape, generator=generator) for shape in ((8, 12), (4, 6))]


def make_targets(head, gt_instances):
    maps = make_maps()
    return head.assign(head.anchors(maps), maps, SIZES, gt_instances)


def random_predictions(num_anchors=120, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, num_anchors, CLASSES), (2, num_anchors, 4), (2, num_anchors))
    return DensePredictions(*[torch.randn(shape, generator=generator) for shape in shapes])


def focal_sum(logits, labels):
    """Focal loss written out, in float64."""
    target = F.one_hot(labels, CLASSES + 1)[..., :CLASSES].double()
    p = logits.double().sigmoid()
    positive = 0.25 * (1 - p) ** 2 * -p.log() * target
    negative = 0.75 * p**2 * -(1 - p).log() * (1 - target)
    return (positive + negative).sum(-1)


def test_anchors_are_squares_centered_on_cell_corners():
    head = make_head()
    fine, coarse = head.anchors(make_maps())
    assert fine.shape == (96, 4) and coarse.shape == (24, 4)
    assert fine[0].tolist() == [-16, -16, 16, 16]
    assert fine[13].tolist() == [8 - 16, 8 - 16, 8 + 16, 8 + 16]  # row 1, column 1
    assert coarse[1].tolist() == [16 - 32, -32, 16 + 32, 32]


def test_assignment_of_a_padded_batch():
    head = make_head()
    targets = make_targets(head, GTS)
    positive = targets.labels < CLASSES
    assert positive[0].any() and not positive[1].any()
    assert (targets.labels[positive] == 2).all()
    assert torch.equal(
        targets.boxes[positive], GTS[0].gt_boxes.tensor.expand(int(positive.sum()), 4)
    )
    assert (targets.boxes[~positive] == 0).all()
    assert targets.inside[0].all()
    # 48 x 64 pixels are 6 x 8 cells of stride 8 and 3 x 4 of stride 16
    inside = [
        cells.view(shape)
        for cells, shape in zip(targets.inside[1].split([96, 24]), ((8, 12), (4, 6)), strict=True)
    ]
    assert inside[0][:6, :8].all() and inside[0].sum() == 48
    assert inside[1][:3, :4].all() and inside[1].sum() == 12


def test_cells_of_odd_sizes_count_when_they_begin_inside():
    cells = InsideCells.of(torch.zeros(1, 4, 6), 16, (33, 80)).mask().view(4, 6)
    assert cells.sum() == 3 * 5 and cells[:3, :5].all()


def test_anchors_in_the_padding_are_never_assigned():
    head = make_head()
    # Beyond the second image: nearest anchors inside have their centers outside of the box.
    outside = make_instances(torch.tensor([[70.0, 50.0, 90.0, 63.0]]), torch.tensor([0]), SIZES[1])
    targets = make_targets(head, [GTS[0], outside])
    assert (targets.labels[1] == CLASSES).all()


def test_losses_by_their_definitions():
    head = make_head()
    targets, predictions = make_targets(head, GTS), random_predictions()
    anchors = torch.cat(head.anchors(make_maps()))
    losses = head.losses(predictions, anchors, targets)

    rows = (targets.labels[0] < CLASSES).nonzero().squeeze(1)
    gt = GTS[0].gt_boxes.tensor
    centerness = []
    for row in rows:
        x, y = ((anchors[row, :2] + anchors[row, 2:]) / 2).tolist()
        left, top, right, bottom = x - 6, y - 9, 39 - x, 41 - y
        across = min(left, right) / max(left, right)
        down = min(top, bottom) / max(top, bottom)
        centerness.append((across * down) ** 0.5)
    centerness = torch.tensor(centerness)
    num_positives = len(rows) + 1  # an image without positives counts as one
    class_sum = (focal_sum(predictions.logits, targets.labels) * targets.inside).sum()
    assert losses["loss_cls"].item() == pytest.approx(class_sum.item() / num_positives, rel=1e-5)

    boxes = head.box_code.transform.apply_deltas(predictions.deltas[0, rows], anchors[rows])
    giou = generalized_box_iou(boxes, gt)[:, 0]
    expected = 2 * ((1 - giou) * centerness).sum() / max(centerness.sum().item(), 1.0)
    assert losses["loss_bbox"].item() == pytest.approx(expected.item(), rel=1e-5)

    entropy = F.binary_cross_entropy_with_logits(
        predictions.quality[0, rows], centerness, reduction="sum"
    )
    expected = entropy.item() / num_positives
    assert losses["loss_centerness"].item() == pytest.approx(expected, rel=1e-5)


def test_losses_without_ground_truth():
    head = make_head()
    targets, predictions = make_targets(head, [GTS[1], GTS[1]]), random_predictions()
    losses = head.losses(predictions, torch.cat(head.anchors(make_maps())), targets)
    class_sum = (focal_sum(predictions.logits, targets.labels) * targets.inside).sum()
    assert losses["loss_cls"].item() == pytest.approx(class_sum.item() / 2, rel=1e-5)
    assert losses["loss_bbox"] == losses["loss_centerness"] == 0


def test_the_box_loss_is_divided_by_the_centerness_but_not_by_less_than_one():
    head = make_head()
    anchor = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    box = torch.tensor([[6.0, 7.0, 26.0, 27.0]])  # the anchor's center is near a corner
    centerness = centerness_target(anchor, box)
    assert centerness.item() == pytest.approx((2 / 18 * 1 / 19) ** 0.5)
    zeros = torch.zeros(1, 1, 4)
    predictions = DensePredictions(torch.zeros(1, 1, CLASSES), zeros, torch.zeros(1, 1))
    zero = torch.tensor([[0]])
    targets = DenseTargets(zero, box[None], torch.tensor([[True]]), truths=zero)
    loss = head.losses(predictions, anchor, targets)["loss_bbox"]
    expected = 2 * (1 - generalized_box_iou(anchor, box)) * centerness  # not divided by 0.077
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_padding_has_no_part_in_the_losses():
    head = make_head()
    targets, anchors = make_targets(head, GTS), torch.cat(head.anchors(make_maps()))
    predictions = random_predictions()
    before = head.losses(predictions, anchors, targets)
    for values in (predictions.logits, predictions.deltas, predictions.quality):
        values[~targets.inside] = 50.0
    after = head.losses(predictions, anchors, targets)
    assert {k: v.item() for k, v in before.items()} == {k: v.item() for k, v in after.items()}


def test_candidates_carry_boxes_targets_and_the_features_of_their_cells():
    head = make_head()
    maps = [level_map.requires_grad_() for level_map in make_maps()]
    images = ImageList(torch.zeros(2, 3, 64, 96), SIZES)
    output = head(images, dict(zip(["p3", "p4"], maps, strict=True)), GTS)
    for image, instances in enumerate(output.candidates.instances):
        assert isinstance(instances, Instances) and instances.image_size == SIZES[image]
        assert isinstance(instances.gt_boxes, Boxes) and len(instances) == 120
    indices = torch.tensor([0, 13, 95, 96, 119, 13])
    rows = output.candidates.gather_features(1, indices)
    where = [(0, 0, 0), (0, 1, 1), (0, 7, 11), (1, 0, 0), (1, 3, 5), (0, 1, 1)]
    for row, (level, y, x) in zip(rows, where, strict=True):
        assert torch.equal(row, maps[level][1, :, y, x])
    rows.sum().backward()
    assert maps[0].grad[1, :, 1, 1].tolist() == [2.0] * 8
    assert maps[0].grad.sum() == 4 * 8 and maps[1].grad.sum() == 2 * 8


def test_decoded_sizes_are_bounded_on_both_sides():
    head = make_head()
    anchor = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    extreme = torch.tensor([[0.0, 0.0, 1e4, -1e4]])
    x1, y1, x2, y2 = decode_deltas(head.box_code.transform, extreme, anchor)[0].tolist()
    assert x2 - x1 == pytest.approx(1000, rel=1e-4)
    assert y2 - y1 == pytest.approx(16 * 16 / 1000, rel=1e-4)


def test_levels_without_a_stride():
    with pytest.raises(ConfigError, match="3 in_features but 1 strides"):
        ATSSHead(
            num_classes=1,
            embed_dim=8,
            in_features=["p3", "p4", "p5"],
            strides=[8],
            assigner=ATSSAssigner(),
        )
