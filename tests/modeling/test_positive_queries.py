"""Customized positive queries: how many, which candidates, what they code and should predict."""

import copy

import pytest
import torch

from co_detr.errors import ConfigError
from co_detr.modeling.auxiliary import HybridAssignmentHeads
from co_detr.modeling.losses import normalize_boxes
from co_detr.modeling.queries import PositiveQueries
from tests.device import DEVICE
from tests.modeling.builders import NUM_CLASSES, factor_of, geometry_of, make_candidates, randomize

SIZES = [(96, 128), (96, 128)]


def make_source(**settings):
    torch.manual_seed(0)
    settings = {"num_classes": NUM_CLASSES, "embed_dim": 32, "max_queries": 30} | settings
    source = PositiveQueries(**settings)
    randomize(source)
    return source.to(DEVICE).double()


def make_group(positives, backgrounds, **settings):
    candidates, _ = make_candidates(positives, backgrounds)
    return make_source(**settings)("atss_queries", candidates, geometry_of(SIZES)), candidates


def labels_of(group, image):
    return group.targets.labels[0, image]


@pytest.mark.parametrize(
    ("positives", "length"), [((0, 0), 9), ((3, 8), 9), ((3, 12), 12), ((50, 12), 30)]
)
@pytest.mark.parametrize("padding", ["negatives", "mask"])
def test_length_of_the_group(positives, length, padding):
    group, _ = make_group(positives, (40, 40), padding=padding)
    assert group.content.shape == group.position.shape == (2, length, 32)
    assert group.reference.shape == (2, length, 4)
    for image, number in enumerate(positives):
        foreground = (labels_of(group, image) < NUM_CLASSES).sum()
        assert foreground == min(number, length)


def test_negatives_fill_up_and_are_trained_as_background():
    group, candidates = make_group((3, 12), (40, 40), padding="negatives")
    assert group.valid is None
    assert (group.targets.weights == 1).all()
    background = normalize_boxes(
        candidates.instances[0][
            candidates.instances[0].gt_classes == NUM_CLASSES
        ].proposal_boxes.tensor.double(),
        factor_of(SIZES[0]),
    )
    assert (labels_of(group, 0)[3:] == NUM_CLASSES).all()
    fillers = group.reference[0, 3:]
    assert all((background == filler).all(1).any() for filler in fillers)
    assert len(fillers.unique(dim=0)) == 9  # drawn without replacement


def test_code_of_a_box_beyond_the_image_is_that_of_the_box_cut_to_it():
    """Anchors are larger than small images; the decoder attends around them as they are."""
    sides = {"beyond": [-64.0, -48.0, 192.0, 144.0], "whole": [0.0, 0.0, 128.0, 96.0]}
    groups = {}
    for name, box in sides.items():
        candidates, _ = make_candidates((1, 1), (0, 0))
        for instances in candidates.instances:
            instances.proposal_boxes.tensor[:] = torch.tensor(box)
        source = make_source(padding="mask", with_features=False, with_position=True)
        groups[name] = source("atss_queries", candidates, geometry_of(SIZES))
    beyond, whole = (groups[name] for name in sides)
    assert beyond.reference[0, 0].tolist() == [0.5, 0.5, 2.0, 2.0]
    assert whole.reference[0, 0].tolist() == [0.5, 0.5, 1.0, 1.0]
    assert torch.equal(beyond.content, whole.content)
    assert torch.equal(beyond.position, whole.position)


def test_unknown_settings_are_named():
    with pytest.raises(ConfigError, match='self_attention must be "group" or "self", got'):
        make_source(self_attention="all")


def test_masked_slots_are_in_no_loss():
    group, _ = make_group((3, 12), (40, 40), padding="mask")
    assert group.valid.sum(1).tolist() == [3, 12]
    assert group.valid[0, :3].all()
    assert torch.equal(group.targets.weights[0], group.valid.double())
    assert (labels_of(group, 0)[3:] == NUM_CLASSES).all()


def test_too_few_background_candidates_leave_masked_slots():
    group, _ = make_group((3, 12), (4, 0), padding="negatives")
    assert group.valid.sum(1).tolist() == [7, 12]
    assert torch.equal(group.targets.weights[0], group.valid.double())
    assert (labels_of(group, 0)[3:] == NUM_CLASSES).all()


def test_ignored_candidates_are_never_chosen():
    group, candidates = make_group((3, 5), (6, 30), padding="negatives")
    for image, instances in enumerate(candidates.instances):
        ignored = instances[instances.gt_classes == -1].proposal_boxes.tensor.double()
        ignored = normalize_boxes(ignored, factor_of(SIZES[image]))
        assert len(ignored) == 2
        assert not (group.reference[image][:, None] == ignored[None]).all(-1).any()


def test_excess_positives_are_chosen_at_random():
    candidates, _ = make_candidates((50, 50), (0, 0))
    source = make_source()
    chosen = [source("x", candidates, geometry_of(SIZES)).reference for _ in range(2)]
    assert not torch.equal(*chosen)
    for reference in chosen:
        assert len(reference[0].unique(dim=0)) == 30
    source.permutation = lambda n: torch.arange(n)
    first = source("x", candidates, geometry_of(SIZES))
    foreground = candidates.instances[0].gt_classes
    foreground = ((foreground >= 0) & (foreground < NUM_CLASSES)).nonzero()[:30, 0]
    expected = candidates.instances[0].proposal_boxes.tensor[foreground].double()
    torch.testing.assert_close(first.reference[0], normalize_boxes(expected, factor_of(SIZES[0])))


def test_targets_are_what_the_head_assigned():
    group, candidates = make_group((10, 12), (0, 0), padding="mask")
    for image, instances in enumerate(candidates.instances):
        positive = (instances.gt_classes >= 0) & (instances.gt_classes < NUM_CLASSES)
        number = int(positive.sum())
        assert torch.equal(labels_of(group, image)[:number], instances.gt_classes[positive])
        for found, field in (
            (group.targets.boxes[0, image], instances.gt_boxes),
            (group.reference[image], instances.proposal_boxes),
        ):
            expected = normalize_boxes(field.tensor[positive].double(), factor_of(SIZES[image]))
            torch.testing.assert_close(found[:number], expected)


def test_gradients_reach_the_features_of_chosen_candidates_only():
    candidates, tables = make_candidates((10, 4), (20, 20))
    source = make_source(padding="mask")
    group = source("x", candidates, geometry_of(SIZES))
    (group.content[group.valid] * torch.randn(14, 32).double()).sum().backward()
    for instances, table in zip(candidates.instances, tables, strict=True):
        positive = (instances.gt_classes >= 0) & (instances.gt_classes < NUM_CLASSES)
        assert torch.equal(table.grad.abs().sum(1) > 0, positive)
    assert not group.reference.requires_grad
    for name, parameter in source.named_parameters():
        # The scalar of the head joins the position only.
        assert (parameter.grad is None) == (name == "head_embedding"), name


def test_features_change_content_and_the_embedding_changes_position():
    candidates, tables = make_candidates((10, 10), (0, 0))
    source = make_source(min_queries=10)
    before = source("x", candidates, geometry_of(SIZES))
    with torch.no_grad():
        for table in tables:
            table += torch.randn(table.shape).double()
        source.head_embedding += 0.5
    after = source("x", candidates, geometry_of(SIZES))
    assert (after.content - before.content).abs().amax(-1).min() > 1e-2
    torch.testing.assert_close(
        after.position - before.position, torch.full((2, 10, 32), 0.5).double()
    )


def test_without_features_only_boxes_are_coded():
    candidates, _ = make_candidates((10, 10), (0, 0))
    candidates = copy.copy(candidates)
    object.__setattr__(candidates, "gather_features", None)  # would fail if it was called
    source = make_source(with_features=False)
    assert {name.split("_")[0] for name, _ in source.named_parameters()} == {"position"}
    assert source("x", candidates, geometry_of(SIZES)).content.shape == (2, 10, 32)


def test_unknown_padding():
    with pytest.raises(ConfigError, match="got 'zeros'"):
        make_source(padding="zeros")


def test_every_head_gets_its_own_copy_with_its_own_weights():
    source = PositiveQueries(num_classes=NUM_CLASSES, embed_dim=32)
    heads = HybridAssignmentHeads(
        pyramid=torch.nn.Identity(),
        positive_queries=source,
        num_decoder_layers=3,
        lambda_2=2.0,
        one=torch.nn.Identity(),
        two=torch.nn.Identity(),
    )
    assert heads.loss_weight == 6.0
    first, second = heads.positive_queries["one"], heads.positive_queries["two"]
    for name in ("position_proj.weight", "feature_proj.weight", "head_embedding"):
        assert not torch.equal(first.get_parameter(name), second.get_parameter(name))
    with pytest.raises(ConfigError, match="needs a head"):
        HybridAssignmentHeads(
            pyramid=torch.nn.Identity(), positive_queries=source, num_decoder_layers=3
        )
