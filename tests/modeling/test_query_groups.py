"""Groups are decoded together exactly as each would be alone (Co-DETR decodes them in turn)."""

from dataclasses import replace

import pytest
import torch

from co_detr.errors import ConfigError
from co_detr.modeling.losses import assign_targets, score_groups
from co_detr.structures import AssignedTargets, GroundTruth, Predictions, QueryGroup, QuerySet
from tests.modeling.builders import make_batch, make_candidates, randomize, tiny_model


def make_groups(padding):
    """A model in float64, its memory of two padded images, and its three groups.

    The positive queries are fed with made-up candidates: Detectron2's RPN only runs in float32.
    """
    model = tiny_model(2).double()
    randomize(model)
    batch = make_batch()
    memory = model.encode(model.preprocess(batch))
    groups = [model.queries["matching"](memory)]
    for seed, (name, source) in enumerate(model.auxiliary.positive_queries.items()):
        source.padding = padding
        # Images need different numbers of queries, so that "mask" has slots to mask.
        candidates, _ = make_candidates((5 + 8 * seed, 12), (20, 20), seed=seed)
        groups.append(source(name, candidates, memory.geometry))
    return model, memory, groups


def weighted_sum(predictions: Predictions, seed: int) -> torch.Tensor:
    """A scalar in which every output has a weight of its own."""
    generator = torch.Generator().manual_seed(seed)
    return sum(
        (values * torch.randn(values.shape, generator=generator, dtype=values.dtype)).sum()
        for values in (predictions.logits, predictions.boxes)
    )


def gradients(model, predictions):
    total = sum(weighted_sum(prediction, seed) for seed, prediction in enumerate(predictions))
    named = dict(model.named_parameters())
    values = torch.autograd.grad(total, list(named.values()), retain_graph=True, allow_unused=True)
    return {name: value for name, value in zip(named, values, strict=True) if value is not None}


@pytest.mark.parametrize("padding", ["negatives", "mask"])
def test_one_pass_equals_decoding_group_by_group(padding):
    model, memory, groups = make_groups(padding)
    assert any(group.valid is not None for group in groups) == (padding == "mask")
    together = QuerySet.concat(groups)
    one_pass = together.split(model.decoder(together, memory))
    alone = [model.decoder(QuerySet.concat([group]), memory) for group in groups]
    for joint, single in zip(one_pass, alone, strict=True):
        torch.testing.assert_close(joint.logits, single.logits, rtol=0, atol=1e-11)
        torch.testing.assert_close(joint.boxes, single.boxes, rtol=0, atol=1e-11)

    expected, actual = gradients(model, alone), gradients(model, one_pass)
    assert expected.keys() == actual.keys()
    assert {name for name, _ in model.decoder.named_parameters(prefix="decoder")} <= set(actual)
    assert {name.split(".")[0] for name in actual} == {
        "backbone",
        "encoder",
        "decoder",
        "queries",
        "auxiliary",
    }
    for name, value in expected.items():
        scale = value.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-9 * scale, msg=name)


def test_without_the_mask_groups_would_mix():
    model, memory, groups = make_groups("negatives")
    together = QuerySet.concat(groups)
    unmasked = QuerySet(
        together.content, together.position, together.reference, None, together.sizes
    )
    mixed = model.decoder(unmasked, memory).logits - model.decoder(together, memory).logits
    assert mixed.abs().max() > 1e-2


def test_padded_slots_do_not_reach_the_others():
    model, memory, groups = make_groups("mask")
    group = groups[1]
    changed = QueryGroup(
        group.name,
        torch.where(group.valid[..., None], group.content, 100.0),
        group.position,
        group.reference,
        group.valid,
    )
    before, after = (model.decoder(QuerySet.concat([part]), memory) for part in (group, changed))
    torch.testing.assert_close(after.logits[:, group.valid], before.logits[:, group.valid])
    assert not torch.allclose(after.logits[:, ~group.valid], before.logits[:, ~group.valid])


def plain_group(name, size, valid=None, batch=2):
    generator = torch.Generator().manual_seed(size)
    content, position, reference = (
        torch.rand(batch, size, width, generator=generator) for width in (8, 8, 4)
    )
    return QueryGroup(name, content, position, reference, valid)


VALID = torch.tensor([[True, True, False], [False, False, False]])


@pytest.mark.parametrize(
    "groups",
    [
        [("a", 4, None), ("b", 3, None)],
        [("a", 4, None), ("b", 3, VALID), ("c", 2, None)],
        [("a", 3, VALID), ("b", 3, ~VALID)],
        [("a", 3, VALID)],
    ],
)
def test_truth_table_of_the_attend_mask(groups):
    groups = [plain_group(*parts) for parts in groups]
    mask = QuerySet.concat(groups).attend_mask
    slots = [
        (group.name, slot, group.valid) for group in groups for slot in range(group.num_queries)
    ]
    total = len(slots)
    full = mask.expand(2, 1, total, total)
    for image in range(2):
        for row, (name, slot, _) in enumerate(slots):
            for column, (other, other_slot, valid) in enumerate(slots):
                itself = (name, slot) == (other, other_slot)
                usable = valid is None or bool(valid[image, other_slot])
                expected = itself or (name == other and usable)
                assert full[image, 0, row, column] == expected, (image, row, column)


def test_one_unpadded_group_needs_no_mask():
    assert QuerySet.concat([plain_group("a", 4)]).attend_mask is None


def test_groups_need_names_of_their_own():
    with pytest.raises(ConfigError, match="two query groups are called a"):
        QuerySet.concat([plain_group("a", 4), plain_group("a", 2)])


def test_splitting_what_was_joined_gives_it_back():
    groups = [plain_group("a", 4), plain_group("b", 1), plain_group("c", 7)]
    together = QuerySet.concat(groups)
    assert together.sizes == [4, 1, 7]
    parts = together.split(Predictions(together.content[None], together.reference[None]))
    for group, part in zip(groups, parts, strict=True):
        assert torch.equal(part.logits[0], group.content)
        assert torch.equal(part.boxes[0], group.reference)


def test_groups_keep_their_own_targets():
    """What a positive group should predict comes from its candidates alone, for every layer."""
    model, _, groups = make_groups("negatives")
    matching, *positive = groups
    assert matching.targets is None
    for group in positive:
        targets: AssignedTargets = group.targets
        assert targets.labels.shape == (1, 2, group.num_queries)
        assert targets.labels.max() == model.num_classes  # some background fills up
        assert (targets.labels < model.num_classes).sum() in (5 + 12, 13 + 12)


def test_losses_of_a_group_and_of_its_proposals_have_their_weights():
    """A group's weight is for its decoder layers; its encoder proposals count once."""
    model, memory, groups = make_groups("mask")
    geometry = memory.geometry
    truth = [
        GroundTruth(torch.tensor([1, 3]), torch.rand(2, 4, dtype=torch.float64) / 2 + 0.2, factor)
        for factor in geometry.factors
    ]
    groups[0] = replace(groups[0], loss_weight=3.0)
    predictions = QuerySet.concat(groups).split(model.decoder(QuerySet.concat(groups), memory))
    assigned = assign_targets(groups, predictions, truth, model.assigner, model.num_classes)
    losses = score_groups(groups, predictions, assigned, geometry, model.criterion)
    criterion = model.criterion
    proposals = groups[0].proposals.predictions
    expected = {
        "matching": (3.0, predictions[0], assigned.groups[0]),
        "matching.enc": (1.0, proposals, assigned.proposals["matching"]),
    }
    for name, (weight, predicted, targets) in expected.items():
        terms = criterion(predicted, targets, geometry, criterion.count_positives(targets))
        for key, values in terms.items():
            assert values[-1] > 0
            torch.testing.assert_close(losses[f"{name}.{key}"], weight * values[-1])
    # Class-agnostic: every ground truth is class 0 for the proposals of Co-Deformable-DETR.
    labels = assigned.proposals["matching"].labels
    assert set(labels.unique().tolist()) == {0, model.num_classes}


@pytest.mark.parametrize("padding", ["negatives", "mask"])
def test_positive_queries_can_be_kept_to_themselves(padding):
    """Each is then decoded as if it were the only one; the matched queries notice nothing."""
    model, memory, _ = make_groups(padding)
    candidates, _ = make_candidates((5, 12), (20, 20))
    matched = model.queries["matching"](memory)
    predictions = {}
    for attention in ("group", "self"):
        source = next(iter(model.auxiliary.positive_queries.values()))
        source.padding, source.self_attention = padding, attention
        torch.manual_seed(0)  # which negatives fill up
        group = source("roi_queries", candidates, memory.geometry)
        queries = QuerySet.concat([matched, group])
        predictions[attention] = queries.split(model.decoder(queries, memory))
    (before, together), (after, apart) = predictions["group"], predictions["self"]
    assert torch.equal(before.logits, after.logits)
    assert (together.logits - apart.logits).abs().max() > 1e-2
    for slot in range(3):
        pick = slice(slot, slot + 1)
        alone = replace(
            group,
            content=group.content[:, pick],
            position=group.position[:, pick],
            reference=group.reference[:, pick],
            valid=None if group.valid is None else group.valid[:, pick],
            num_blocks=1,
        )
        expected = model.decoder(QuerySet.concat([alone]), memory)
        torch.testing.assert_close(apart.logits[:, :, pick], expected.logits, rtol=0, atol=1e-11)
        torch.testing.assert_close(apart.boxes[:, :, pick], expected.boxes, rtol=0, atol=1e-11)
