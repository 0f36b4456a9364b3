"""Iterative refinement of boxes, encoder proposals, and what is kept of the predictions."""

import pytest
import torch

from co_detr.errors import ConfigError, NonFiniteError
from co_detr.modeling import DeformableDecoder, TopKPostprocessor
from co_detr.modeling.queries.sources import propose_grid
from co_detr.modeling.transformer import inverse_sigmoid
from co_detr.structures import QueryGroup, QuerySet
from tests.device import DEVICE
from tests.modeling.builders import geometry_of, random_memory, randomize, tiny_model


def make_decoder(**settings):
    torch.manual_seed(0)
    decoder = DeformableDecoder(
        num_classes=3,
        num_layers=3,
        embed_dim=32,
        num_heads=4,
        num_points=2,
        feedforward_dim=16,
        **settings,
    )
    return decoder.to(DEVICE).double()


def make_queries(number=7):
    generator = torch.Generator().manual_seed(0)
    content, position = torch.randn(2, 2, number, 32, generator=generator).double()
    reference = 0.2 + 0.5 * torch.rand(2, number, 4, generator=generator).double()
    return QuerySet.concat([QueryGroup("matching", content, position, reference)])


def test_boxes_start_at_their_references():
    queries = make_queries()
    predictions = make_decoder()(queries, random_memory())
    assert predictions.logits.shape == (3, 2, 7, 3) and predictions.boxes.shape == (3, 2, 7, 4)
    for boxes in predictions.boxes:
        torch.testing.assert_close(boxes, queries.reference)
    # Focal loss starts with every class at one per cent.
    assert predictions.logits.sigmoid().mean().item() == pytest.approx(0.01, rel=0.3)


@pytest.mark.parametrize("twice", [True, False])
def test_look_forward_twice_trains_one_more_box_head(twice):
    decoder = make_decoder(look_forward_twice=twice)
    randomize(decoder)
    predictions = decoder(make_queries(), random_memory())
    predictions.boxes[2].sum().backward()
    trained = [bool(head.layers[2].weight.grad.any()) for head in decoder.box_heads]
    assert trained == [False, twice, True]  # the references between are detached


def test_every_layer_refines_the_box_of_the_one_before():
    decoder, queries, memory = make_decoder(), make_queries(), random_memory()
    step = torch.tensor([0.3, -0.2, 0.1, 0.05]).double()
    with torch.no_grad():
        for head in decoder.box_heads:  # constant offsets in logit space
            head.layers[2].bias.copy_(step)
    boxes = decoder(queries, memory).boxes
    start = inverse_sigmoid(queries.reference)
    for layer in range(3):
        torch.testing.assert_close(boxes[layer], (start + (layer + 1) * step).sigmoid())


def test_cells_propose_boxes_of_their_level():
    memory = random_memory(level_shapes=[(4, 6), (2, 3)], image_sizes=[(32, 48)])
    tokens, logits = propose_grid(memory)
    grid = logits.sigmoid()[0]
    assert grid.shape == (30, 4) and torch.equal(tokens, memory.tokens)
    # row 1, column 1 of the finest level; then the first cell of the next one
    assert grid[7].tolist() == pytest.approx([1.5 / 6, 1.5 / 4, 0.05, 0.05])
    assert grid[24].tolist() == pytest.approx([0.5 / 3, 0.5 / 2, 0.1, 0.1])


def test_tokens_at_the_border_or_in_the_padding_do_not_propose():
    memory = random_memory(level_shapes=[(2, 64)], image_sizes=[(16, 512)])
    memory.padding_mask[0, 5] = True
    tokens, logits = propose_grid(memory)
    # The center of the first and last of 64 cells is at 0.0078 and 0.9922, outside of (0.01, 0.99).
    blocked = [0, 5, 63, 64, 127]
    usable = [i for i in range(128) if i not in blocked]
    assert logits[0, blocked].isinf().all() and (tokens[0, blocked] == 0).all()
    assert logits[0, usable].isfinite().all()
    assert torch.equal(tokens[0, usable], memory.tokens[0, usable])


def test_the_best_proposals_become_references():
    source = tiny_model(0).queries["matching"].double()
    randomize(source)
    group = source(random_memory(image_sizes=((96, 128),)))
    proposals = group.proposals.predictions
    best = proposals.logits[0, 0, :, 0].argsort(descending=True)[: source.num_queries]
    torch.testing.assert_close(group.reference[0], proposals.boxes[0, 0, best])
    assert not group.reference.requires_grad
    assert torch.equal(group.content[0], source.content.weight)


def test_queries_may_tell_what_their_token_saw():
    overrides = ["model.queries.matching.with_features=true"]
    source = tiny_model(0, overrides).queries["matching"].double()
    randomize(source)
    memory = random_memory(image_sizes=((96, 128),))
    memory.tokens.requires_grad_()
    group = source(memory)
    seen = memory.tokens[0, group.tokens[0]]
    expected = source.content.weight + source.feature_norm(source.feature_proj(seen))
    torch.testing.assert_close(group.content[0], expected)
    # Unlike those of the references, these gradients train the encoder.
    (gradient,) = torch.autograd.grad(group.content.square().sum(), memory.tokens)
    assert gradient[0].any(-1).nonzero().flatten().tolist() == sorted(group.tokens[0].tolist())


def test_the_best_pairs_of_query_and_class_are_kept():
    logits = torch.tensor([[[0.0, 5.0, -9.0], [4.0, -9.0, -9.0], [-9.0, -9.0, -1.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.1, 0.5, 0.4, 0.2], [0.5, 0.5, 1.0, 1.0]]])
    (found,) = TopKPostprocessor(max_detections=4)(logits, boxes, geometry_of([(50, 100)]))
    assert found.pred_classes.tolist() == [1, 0, 0, 2]
    torch.testing.assert_close(found.scores, torch.tensor([5.0, 4.0, 0.0, -1.0]).sigmoid())
    first, second = [40.0, 15.0, 60.0, 35.0], [0.0, 20.0, 30.0, 30.0]  # clipped at 0
    expected = torch.tensor([first, second, first, [0.0, 0.0, 100.0, 50.0]])
    torch.testing.assert_close(found.pred_boxes.tensor, expected)
    (all_pairs,) = TopKPostprocessor(max_detections=100)(logits, boxes, geometry_of([(50, 100)]))
    assert len(all_pairs) == 9


def test_boxes_that_are_nan_are_reported():
    boxes = torch.full((1, 2, 4), float("nan"))
    with pytest.raises(NonFiniteError, match="predicts boxes that are NaN"):
        TopKPostprocessor()(torch.zeros(1, 2, 3), boxes, geometry_of([(50, 100)]))


def test_wrong_number_of_maps():
    encoder = tiny_model(0).encoder
    with pytest.raises(ConfigError, match="built for 4 levels but got 1 maps"):
        encoder([torch.zeros(1, 32, 4, 4)], geometry_of([(32, 32)]))
