"""RetinaNet, FCOS, PAA and GFL: what they leave out, what they give and what they detect."""

import pytest
import torch
from detectron2.structures import ImageList

from tests.modeling.builders import NUM_CLASSES, make_batch, make_instances, tiny_model
from tests.modeling.dense_cases import GTS, SIZES, make_maps, run_dense_head

NEW = ["retinanet", "fcos", "paa", "gfl"]


@pytest.mark.parametrize("name", NEW)
def test_padding_is_neither_positive_nor_negative(heads, name):
    head = heads[name]
    # The second image's box touches its border, so that anchors beyond would do as well.
    second = make_instances(torch.tensor([[30.0, 20.0, 80.0, 64.0]]), torch.tensor([1]), SIZES[1])
    anchors, predictions, targets = run_dense_head(head, [GTS[0], second])
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
    maps = [level_map.requires_grad_() for level_map in make_maps(head)]
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
    center = 2.5 if name == "fcos" else 2.0, 3.5 if name == "fcos" else 3.0
    box = anchors[indices[0]]
    assert ((box[1] + box[3]) / 2, (box[0] + box[2]) / 2) == (8 * center[0], 8 * center[1])


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


@pytest.mark.parametrize("name", NEW)
def test_each_detects_alone(name):
    model = tiny_model(6, [f"model.evaluate_with={name}"]).eval()
    with torch.no_grad():
        detections = model(make_batch())
    for found in (result["instances"] for result in detections):
        assert 0 < len(found) <= 100
        assert (found.scores.diff() <= 0).all() and (found.scores <= 1).all()
        assert (found.pred_classes < NUM_CLASSES).all()


def test_scores_of_paa_are_geometric_means(heads):
    scores = heads.paa.rescore(torch.tensor([0.25]), torch.tensor([0.64]))
    assert scores.item() == pytest.approx(0.4)
    scores = heads.fcos.rescore(torch.tensor([0.25]), torch.tensor([0.64]))
    assert scores.item() == pytest.approx(0.16)
