"""One-to-one assignment against brute force, and the losses on top of it."""

import itertools

import pytest
import torch
from torchvision.ops import generalized_box_iou

from co_detr.modeling import FocalLoss, HungarianAssigner, SetCriterion
from co_detr.modeling.losses import MatchingProblem, cxcywh_to_xyxy, name_layers
from co_detr.structures import AssignedTargets, GroundTruth, Predictions
from tests.modeling.builders import factor_of, geometry_of

LAYERS, QUERIES, CLASSES = 2, 6, 4
SIZE = (90, 160)


def make_problem(num_gts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch = len(num_gts)
    logits = torch.randn(LAYERS, batch, QUERIES, CLASSES, generator=generator)
    boxes = 0.1 + 0.5 * torch.rand(LAYERS, batch, QUERIES, 4, generator=generator)
    truth = [
        GroundTruth(
            torch.randint(0, CLASSES, (number,), generator=generator),
            0.1 + 0.5 * torch.rand(number, 4, generator=generator),
            factor_of(SIZE),
        )
        for number in num_gts
    ]
    return MatchingProblem(Predictions(logits, boxes), truth, CLASSES)


def pair_cost(logit, box, label, true_box):
    """The cost of one pair as the papers write it, in float64."""
    p = logit[label].double().sigmoid()
    focal = -0.25 * (1 - p) ** 2 * p.log() + 0.75 * p**2 * (1 - p).log()
    distance = (box - true_box).abs().sum()
    corners = [(cxcywh_to_xyxy(cxcywh) * factor_of(SIZE))[None] for cxcywh in (box, true_box)]
    return float(2 * focal + 5 * distance - 2 * generalized_box_iou(*corners)[0, 0])


def cost_table(problem, layer, image):
    truth = problem.ground_truth[image]
    return [
        [
            pair_cost(
                problem.predictions.logits[layer, image, query],
                problem.predictions.boxes[layer, image, query],
                truth.labels[gt],
                truth.boxes[gt],
            )
            for gt in range(len(truth.labels))
        ]
        for query in range(QUERIES)
    ]


def test_costs():
    problem = make_problem([3])
    cost = HungarianAssigner().cost(problem.predictions, 0, problem.ground_truth[0])
    assert cost.shape == (LAYERS, QUERIES, 3) and cost.dtype == torch.float32
    for layer in range(LAYERS):
        expected = torch.tensor(cost_table(problem, layer, 0))
        torch.testing.assert_close(cost[layer], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_equals_brute_force(seed):
    problem = make_problem([4, 0, 1, 3], seed)
    (targets,) = HungarianAssigner()([problem])
    assert targets.labels.shape == targets.weights.shape == (LAYERS, 4, QUERIES)
    assert (targets.weights == 1).all()
    for layer, image in itertools.product(range(LAYERS), range(4)):
        truth = problem.ground_truth[image]
        table = cost_table(problem, layer, image)
        best = min(
            itertools.permutations(range(QUERIES), len(truth.labels)),
            key=lambda queries: sum(table[query][gt] for gt, query in enumerate(queries)),
        )
        labels = torch.full((QUERIES,), CLASSES)
        for gt, query in enumerate(best):
            labels[query] = truth.labels[gt]
            assert torch.equal(targets.boxes[layer, image, query], truth.boxes[gt])
        assert torch.equal(targets.labels[layer, image], labels)


def test_order_of_the_ground_truth_does_not_matter():
    problem = make_problem([5, 2])
    shuffled = [
        GroundTruth(truth.labels.flip(0), truth.boxes.flip(0), factor_of(SIZE))
        for truth in problem.ground_truth
    ]
    (first,) = HungarianAssigner()([problem])
    (second,) = HungarianAssigner()([MatchingProblem(problem.predictions, shuffled, CLASSES)])
    assert torch.equal(first.labels, second.labels)
    assigned = first.labels < CLASSES
    assert torch.equal(first.boxes[assigned], second.boxes[assigned])


def test_problems_of_a_step_do_not_mix():
    problems = [make_problem([2, 3]), make_problem([0, 0], 1), make_problem([4, 1], 2)]
    together = HungarianAssigner()(problems)
    for problem, joint in zip(problems, together, strict=True):
        (alone,) = HungarianAssigner()([problem])
        assert torch.equal(joint.labels, alone.labels)
        assert torch.equal(joint.boxes, alone.boxes)


def test_more_ground_truths_than_queries_fill_all_queries():
    (targets,) = HungarianAssigner()([make_problem([QUERIES + 4])])
    assert (targets.labels < CLASSES).all()


def test_diverged_predictions_are_assigned_somehow():
    problem = make_problem([2])
    problem.predictions.logits[:, :, 1] = float("nan")
    problem.predictions.boxes[:, :, 3] = float("nan")
    (targets,) = HungarianAssigner()([problem])
    assert ((targets.labels < CLASSES).sum(-1) == 2).all()


def make_criterion():
    return SetCriterion(num_classes=CLASSES, classification=FocalLoss())


def test_losses_by_their_definitions():
    problem = make_problem([2, 0])
    predictions = problem.predictions
    (targets,) = HungarianAssigner()([problem])
    criterion = make_criterion()
    assert criterion.count_positives(targets).tolist() == [2, 2]
    losses = criterion(predictions, targets, geometry_of([SIZE, SIZE]), torch.tensor([2.0, 2.0]))
    for layer in range(LAYERS):
        focal = bbox = giou = 0.0
        for image, query in itertools.product(range(2), range(QUERIES)):
            label = targets.labels[layer, image, query]
            for c, logit in enumerate(predictions.logits[layer, image, query].double()):
                p = logit.sigmoid()
                positive = -0.25 * (1 - p) ** 2 * p.log()
                negative = -0.75 * p**2 * (1 - p).log()
                focal += float(positive if c == label else negative)
            if label < CLASSES:
                pair = [predictions.boxes[layer, image, query], targets.boxes[layer, image, query]]
                bbox += float((pair[0] - pair[1]).abs().sum())
                corners = [(cxcywh_to_xyxy(cxcywh) * factor_of(SIZE))[None] for cxcywh in pair]
                giou += 1 - float(generalized_box_iou(*corners)[0, 0])
        assert losses["loss_cls"][layer].item() == pytest.approx(2 * focal / 2, rel=1e-5)
        assert losses["loss_bbox"][layer].item() == pytest.approx(5 * bbox / 2, rel=1e-5)
        assert losses["loss_giou"][layer].item() == pytest.approx(2 * giou / 2, rel=1e-5)


def test_a_slot_of_weight_zero_is_in_no_loss():
    problem = make_problem([2, 1])
    (targets,) = HungarianAssigner()([problem])
    criterion, counts = make_criterion(), torch.ones(LAYERS)
    weights = targets.weights.clone()
    weights[:, :, 4:] = 0
    masked = AssignedTargets(targets.labels, targets.boxes, weights)
    expected = criterion(
        Predictions(problem.predictions.logits[:, :, :4], problem.predictions.boxes[:, :, :4]),
        AssignedTargets(targets.labels[:, :, :4], targets.boxes[:, :, :4], weights[:, :, :4]),
        geometry_of([SIZE, SIZE]),
        counts,
    )
    actual = criterion(problem.predictions, masked, geometry_of([SIZE, SIZE]), counts)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)
    positive = (targets.labels < CLASSES)[:, :, :4].sum((1, 2))
    assert criterion.count_positives(masked).tolist() == positive.tolist()


def test_the_normalizer_is_at_least_one():
    problem = make_problem([0])
    (targets,) = HungarianAssigner()([problem])
    losses = [
        make_criterion()(
            problem.predictions, targets, geometry_of([SIZE]), torch.full((LAYERS,), count)
        )
        for count in (0.0, 1.0)
    ]
    assert torch.equal(losses[0]["loss_cls"], losses[1]["loss_cls"])
    assert losses[0]["loss_bbox"].tolist() == losses[0]["loss_giou"].tolist() == [0, 0]


def test_names_of_layers():
    named = name_layers("matching", {"loss_cls": torch.tensor([1.0, 2.0, 3.0])})
    assert {name: value.item() for name, value in named.items()} == {
        "matching.d0.loss_cls": 1,
        "matching.d1.loss_cls": 2,
        "matching.loss_cls": 3,
    }
