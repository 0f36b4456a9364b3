"""Contrastive denoising queries: noise, layout, targets, and who sees whom."""

import pytest
import torch
from detectron2.config import instantiate

from co_detr.engine.config import load_config
from co_detr.errors import ConfigError
from co_detr.modeling.queries import DenoisingQueries
from co_detr.structures import GroundTruth, QueryGroup, QuerySet
from tests.device import DEVICE
from tests.modeling.builders import NUM_CLASSES, factor_of, random_memory, shrink
from tests.paths import config_path

CHANNELS = 32


def make_source(**settings):
    torch.manual_seed(0)
    source = DenoisingQueries(num_classes=NUM_CLASSES, embed_dim=CHANNELS, **settings)
    return source.to(DEVICE)


def make_truth(*num_gts, seed=0):
    """Boxes in the middle of their images, so that noise is never cut off at a border."""
    generator = torch.Generator().manual_seed(seed)
    return [
        GroundTruth(
            labels=torch.randint(0, NUM_CLASSES, (number,), generator=generator),
            boxes=torch.rand(number, 4, generator=generator) * 0.1
            + torch.tensor([0.45, 0.45, 0.05, 0.05]),
            factor=factor_of((96, 128)),
        )
        for number in num_gts
    ]


def make_group(*num_gts, **settings):
    memory = random_memory(image_sizes=[(96, 128)] * len(num_gts), dtype=torch.float32)
    return make_source(**settings)(memory, make_truth(*num_gts))


@pytest.mark.parametrize(
    ("num_gts", "num_blocks", "length"),
    [((3, 5), 20, 10), ((1, 0), 100, 2), ((60, 2), 1, 120), ((101,), 1, 202), ((0, 0), 1, 0)],
)
def test_as_many_blocks_as_fit(num_gts, num_blocks, length):
    group = make_group(*num_gts)
    assert (group.num_blocks, group.num_queries) == (num_blocks, num_blocks * length)
    shape = (len(num_gts), num_blocks * length)
    assert group.content.shape == (*shape, CHANNELS) and group.position is None
    assert group.reference.shape == (*shape, 4) and group.valid is None
    assert group.targets.labels.shape == (1, *shape) == group.targets.weights.shape
    assert group.targets.boxes.shape == (1, *shape, 4)


def test_positives_give_back_the_ground_truth_and_all_else_is_background():
    truth = make_truth(3, 5)
    group = make_group(3, 5)
    labels = group.targets.labels[0].view(2, 20, 2, 5)  # images, blocks, positive or negative
    boxes = group.targets.boxes[0].view(2, 20, 2, 5, 4)
    for image, objects in enumerate(truth):
        count = len(objects.labels)
        assert (labels[image, :, 0, :count] == objects.labels).all()
        assert (boxes[image, :, 0, :count] == objects.boxes).all()
        assert (labels[image, :, 1] == NUM_CLASSES).all()
        assert (labels[image, :, 0, count:] == NUM_CLASSES).all()
    assert (group.targets.weights == 1).all()  # empty slots are trained as background


def test_empty_slots_have_no_content_and_lie_in_the_middle():
    group = make_group(3, 5)
    content = group.content.view(2, 20, 2, 5, CHANNELS)
    reference = group.reference.view(2, 20, 2, 5, 4)
    assert not content[0, :, :, 3:].any() and (reference[0, :, :, 3:] == 0.5).all()
    assert content[0, :, :, :3].any(-1).all() and content[1].any(-1).all()


def sides(boxes):
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


@pytest.mark.parametrize("box_noise", [1.0, 0.4])
def test_sides_move_by_bounded_shares_of_the_box(box_noise):
    # Even a negative's sides keep their order up to a noise of 0.5; a small eps keeps all logits.
    source = make_source(box_noise=box_noise, eps=1e-6)
    memory, (truth,) = random_memory(image_sizes=[(96, 128)]), make_truth(4)
    drawn = []
    usual = source.draw
    source.draw = lambda boxes: drawn.append(usual(boxes)) or drawn[0]
    reference = source(memory, [truth]).reference.view(25, 2, 4, 4)
    draws = drawn[0]
    assert set(draws.signs.unique().tolist()) == {-1.0, 1.0}
    assert 0 <= draws.shifts.min() and draws.shifts.max() < 1
    assert abs(draws.signs.mean()) < 0.15 and abs(draws.shifts.mean() - 0.5) < 0.05
    half = truth.boxes[:, 2:].repeat(1, 2) / 2
    uncrossed = draws.signs.view(25, 2, 4, 4) * (
        draws.shifts.view(25, 2, 4, 4) + torch.tensor([0.0, 1.0])[:, None, None]
    )
    expected = sides(truth.boxes) + uncrossed * half * box_noise
    is_box = (expected[..., 2:] > expected[..., :2] + 1e-4).all(-1)
    assert is_box.all() if box_noise == 0.4 else is_box[:, 0].float().mean() > 0.9
    moved = sides(reference)
    torch.testing.assert_close(moved[is_box], expected[is_box], rtol=0, atol=1e-5)
    distance = (moved - sides(truth.boxes)).abs() / (half * box_noise)
    positives, negatives = distance[:, 0][is_box[:, 0]], distance[:, 1][is_box[:, 1]]
    assert positives.max() <= 1.001 and negatives.min() >= 0.999 and negatives.max() <= 2.001


def test_noised_boxes_stay_in_the_image_and_finite():
    memory = random_memory(image_sizes=[(96, 128)])
    whole = GroundTruth(
        torch.tensor([0, 1]),
        torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.005, 0.995, 0.01, 0.01]]),
        factor_of((96, 128)),
    )
    reference = make_source()(memory, [whole]).reference
    assert reference.isfinite().all() and reference.min() > 0 and reference.max() < 1
    assert sides(reference).min() > -0.01  # up to the bound of the logit


@pytest.mark.parametrize("label_noise", [0.0, 0.5, 1.0])
def test_half_of_the_label_noise_is_replaced(label_noise):
    source = make_source(num_queries=4000, label_noise=label_noise)
    with torch.no_grad():  # an embedding that tells its label
        source.label_embedding.weight.copy_(torch.arange(1.0, NUM_CLASSES + 1)[:, None])
    (truth,) = make_truth(4)
    group = source(random_memory(image_sizes=[(96, 128)]), [truth])
    found = group.content[..., 0].view(-1, 4) - 1
    assert set(found.unique().tolist()) <= set(range(NUM_CLASSES))
    changed = (found != truth.labels).float().mean().item()
    # A replacement is the true label again once in NUM_CLASSES times.
    assert changed == pytest.approx(label_noise / 2 * (1 - 1 / NUM_CLASSES), abs=0.02)
    # Targets are never noised.
    labels = group.targets.labels.view(-1, 2, 4)
    assert (labels[:, 0] == truth.labels).all()


def plain_group(name, size, valid=None, **settings):
    values = torch.zeros(2, size, 8)
    return QueryGroup(name, values, None, torch.zeros(2, size, 4), valid, **settings)


HALF = torch.tensor([[True, False, True], [False, True, True]])


@pytest.mark.parametrize(
    "groups",
    [
        [("matching", 4), ("denoising", 6, None, 3)],
        [("denoising", 6, None, 1), ("matching", 4)],
        [("matching", 4), ("denoising", 6, None, 2), ("roi", 3, HALF), ("atss", 5)],
        [("matching", 3, HALF), ("denoising", 4, None, 4), ("roi", 3)],
        [("matching", 4), ("denoising", 0, None, 1), ("roi", 3)],
        [("denoising", 4, None, 2)],
    ],
    ids=lambda groups: "-".join(f"{group[0]}{group[1]}" for group in groups),
)
def test_truth_table_of_blocks(groups):
    made, names = [], [name for name, *_ in groups]
    for name, size, *rest in groups:
        valid, num_blocks = (*rest, *(None, 1)[len(rest) :])
        sees = ("matching",) if name == "denoising" and "matching" in names else ()
        made.append(plain_group(name, size, valid, num_blocks=num_blocks, sees=sees))
    mask = QuerySet.concat(made).attend_mask
    slots = [(group, slot) for group in made for slot in range(group.num_queries)]
    full = mask.expand(2, 1, len(slots), len(slots))
    for image in range(2):
        for row, (group, slot) in enumerate(slots):
            for column, (other, other_slot) in enumerate(slots):
                if group is other:
                    length = group.num_queries // group.num_blocks
                    allowed = slot // length == other_slot // length
                else:
                    allowed = other.name in group.sees
                usable = other.valid is None or bool(other.valid[image, other_slot])
                expected = (allowed and usable) or row == column
                assert full[image, 0, row, column] == expected, (image, row, column)


def test_a_group_cannot_see_what_is_not_there():
    groups = [plain_group("main", 4), plain_group("denoising", 6, sees=("matching",))]
    with pytest.raises(ConfigError, match="denoising sees the group matching, but .* only main"):
        QuerySet.concat(groups)


def test_denoising_sees_the_matched_group_by_its_name():
    cfg = load_config(config_path("co_dino_r50"), ["model.auxiliary=null", "model.num_classes=5"])
    queries = shrink(cfg).model.queries
    queries.main = queries.pop("matching")
    with pytest.raises(ConfigError, match="model.queries.denoising.sees=matching names no source"):
        instantiate(cfg.model)
    queries.denoising.sees = "main"
    model = instantiate(cfg.model).to(DEVICE)
    memory, truth = random_memory(dtype=torch.float32), make_truth(2, 1)
    groups = [
        group
        for source in model.queries.values()
        for group in source.training_groups(memory, truth)
    ]
    denoising, matched = groups
    mask = QuerySet.concat(groups).attend_mask
    assert matched.name == "main"
    assert mask[: denoising.num_queries, denoising.num_queries :].all()
    assert not mask[denoising.num_queries :, : denoising.num_queries].any()


def test_without_ground_truth_there_are_no_queries_but_a_gradient():
    """Distributed training waits for the gradient of every parameter."""
    source = make_source()
    group = source(random_memory(), make_truth(0, 0))
    assert group.num_queries == 0
    total = group.content.sum() + group.reference.sum()
    (gradient,) = torch.autograd.grad(total, source.label_embedding.weight)
    assert gradient.shape == (NUM_CLASSES, CHANNELS) and not gradient.any()


def test_references_are_detached_and_contents_are_not():
    source = make_source()
    group = source(random_memory(), make_truth(2, 1))
    assert group.content.requires_grad and not group.reference.requires_grad
    group.content.sum().backward()
    assert source.label_embedding.weight.grad.any()
