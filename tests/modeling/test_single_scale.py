"""Dense encoder, conditional attention, and the decoders of Conditional-DETR and DAB-DETR."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from co_detr.errors import ConfigError
from co_detr.modeling import SinePosition
from co_detr.modeling.queries import AnchorQueries, PointQueries
from co_detr.modeling.single_scale import (
    ConditionalCrossAttention,
    ConditionalDecoder,
    ConditionalSelfAttention,
    DABDecoder,
    TransformerEncoder,
)
from co_detr.structures import QueryGroup, QuerySet
from tests.device import DEVICE
from tests.modeling.builders import geometry_of, random_memory, randomize

CHANNELS, HEADS, QUERIES = 32, 4, 5
SIZES = {"embed_dim": CHANNELS, "num_heads": HEADS, "feedforward_dim": 16}
IMAGES = [(96, 160), (128, 97)]


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_encoder(**settings):
    encoder = TransformerEncoder(
        position_encoding=SinePosition(CHANNELS, offset=0.0), num_layers=2, **SIZES, **settings
    )
    randomize(encoder)
    return encoder.to(DEVICE).double().eval()


def make_memory(images=IMAGES, **settings):
    """Memory of images in a batch of 128 x 160 pixels: 4 x 5 tokens."""
    map_ = random(len(images), CHANNELS, 4, 5)
    return make_encoder(**settings)([map_], geometry_of(images, (128, 160)))


def make_decoder(kind, seed=0, **settings):
    decoder = kind(num_classes=3, num_layers=3, **SIZES, **settings)
    if seed is not None:
        randomize(decoder, seed)
    return decoder.to(DEVICE).double().eval()


def make_queries(kind, **changes):
    content, position = random(2, 2, QUERIES, CHANNELS)
    if kind is DABDecoder:
        position = None
    reference = 0.2 + 0.5 * random(2, QUERIES, 4, seed=1).sigmoid()
    values = {"content": content, "position": position, "reference": reference} | changes
    return QuerySet.concat([QueryGroup("matching", **values)])


def naive_attention(query, key, value, allowed):
    """One image and one head: ``(Q, c)``, ``(S, c)``, ``(S, v)`` and ``(Q, S)`` -> ``(Q, v)``."""
    rows = []
    for q, keys_allowed in zip(query, allowed, strict=True):
        scores = [math.exp((q @ k).item() / math.sqrt(len(q))) for k in key]
        scores = [s if ok else 0.0 for s, ok in zip(scores, keys_allowed, strict=True)]
        rows.append(sum(s * v for s, v in zip(scores, value, strict=True)) / sum(scores))
    return torch.stack(rows)


def by_head(x, head):
    width = CHANNELS // HEADS
    return x[:, head * width : (head + 1) * width]


@torch.no_grad()
@pytest.mark.parametrize("adds_position", [True, False])
def test_cross_attention_is_a_content_term_plus_a_spatial_term(adds_position):
    memory = make_memory()
    content, position, spatial = random(3, 2, QUERIES, CHANNELS, seed=2)
    attention = ConditionalCrossAttention(CHANNELS, HEADS, 0.0, adds_position).to(DEVICE).double()
    randomize(attention)
    actual = attention(content, position, spatial, memory)
    for image in range(2):
        query = attention.query_content(content[image])
        key = attention.key_content(memory.tokens[image])
        key_position = attention.key_position(memory.position[image])
        if adds_position:
            query = query + attention.query_position(position[image])
            key = key + key_position
        query_spatial = attention.query_spatial(spatial[image])
        value = attention.value(memory.tokens[image])
        allowed = (~memory.padding_mask[image]).expand(QUERIES, -1)
        heads = [
            naive_attention(
                torch.cat([by_head(query, h), by_head(query_spatial, h)], dim=1),
                torch.cat([by_head(key, h), by_head(key_position, h)], dim=1),
                by_head(value, h),
                allowed,
            )
            for h in range(HEADS)
        ]
        expected = attention.out_proj(torch.cat(heads, dim=1))
        torch.testing.assert_close(actual[image], expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_self_attention_honors_who_may_attend():
    content, position = random(2, 1, QUERIES, CHANNELS)
    allowed = torch.eye(QUERIES, dtype=torch.bool) | (random(QUERIES, QUERIES, seed=3) > 0)
    attention = ConditionalSelfAttention(CHANNELS, HEADS, 0.0).to(DEVICE).double()
    randomize(attention)
    query = attention.query_content(content[0]) + attention.query_position(position[0])
    key = attention.key_content(content[0]) + attention.key_position(position[0])
    value = attention.value(content[0])
    heads = [
        naive_attention(by_head(query, h), by_head(key, h), by_head(value, h), allowed)
        for h in range(HEADS)
    ]
    expected = attention.out_proj(torch.cat(heads, dim=1))
    actual = attention(content, position, allowed)
    torch.testing.assert_close(actual[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale_position", [True, False])
def test_padding_does_not_change_an_image(scale_position):
    """Inside a padded batch, tokens and predictions of an image are those of the image alone."""
    encoder = make_encoder(scale_position=scale_position)
    map_ = random(1, CHANNELS, 3, 4)
    alone = encoder([map_], geometry_of([(96, 128)]))
    padded_map = torch.full((1, CHANNELS, 4, 5), 9.0, dtype=torch.float64)
    padded_map[:, :, :3, :4] = map_
    padded = encoder([padded_map], geometry_of([(96, 128)], (128, 160)))
    assert padded.padding_mask.sum() == 8
    torch.testing.assert_close(padded.maps()[0][:, :, :3, :4], alone.maps()[0])
    torch.testing.assert_close(padded.valid_ratios, torch.tensor([[[0.8, 0.75]]]).double())
    for kind in (ConditionalDecoder, DABDecoder):
        queries = make_queries(kind, content=random(1, QUERIES, CHANNELS))
        queries = QuerySet(
            queries.content,
            None if queries.position is None else queries.position[:1],
            queries.reference[:1],
            None,
            [QUERIES],
        )
        decoder = make_decoder(kind)
        torch.testing.assert_close(decoder(queries, padded).boxes, decoder(queries, alone).boxes)


def test_an_encoder_of_one_map_refuses_two():
    with pytest.raises(ConfigError, match="one map but got 2: let model.backbone give"):
        make_encoder()([random(1, CHANNELS, 4, 5)] * 2, geometry_of([(128, 160)]))


def test_dropout_reaches_the_attention_in_training_only():
    attention = ConditionalSelfAttention(CHANNELS, HEADS, 0.5).to(DEVICE).double()
    content, position = random(2, 1, QUERIES, CHANNELS)
    first, second = (attention(content, position, None) for _ in range(2))
    assert not torch.equal(first, second)
    attention.eval()
    first, second = (attention(content, position, None) for _ in range(2))
    assert torch.equal(first, second)
    encoder = make_encoder(dropout=0.5)
    assert encoder.layers[0].attention.dropout.p == 0.5


def test_boxes_start_at_anchors_or_at_points():
    memory = make_memory()
    anchors = make_queries(DABDecoder)
    for boxes in make_decoder(DABDecoder, seed=None)(anchors, memory).boxes:
        torch.testing.assert_close(boxes, anchors.reference)
    points = make_queries(ConditionalDecoder)
    for boxes in make_decoder(ConditionalDecoder, seed=None)(points, memory).boxes:
        torch.testing.assert_close(boxes[..., :2], points.reference[..., :2])
        torch.testing.assert_close(boxes[..., 2:], torch.full_like(boxes[..., 2:], 0.5))


def test_conditional_decoder_does_not_read_sizes():
    memory, queries = make_memory(), make_queries(ConditionalDecoder)
    other = queries.reference * torch.tensor([1.0, 1.0, 0.3, 2.0])
    decoder = make_decoder(ConditionalDecoder)
    expected = decoder(queries, memory)
    actual = decoder(make_queries(ConditionalDecoder, reference=other), memory)
    assert torch.equal(actual.boxes, expected.boxes)
    moved = decoder(make_queries(ConditionalDecoder, reference=queries.reference * 0.9), memory)
    assert not torch.equal(moved.logits, expected.logits)


def test_anchors_narrow_the_attention():
    """The halves of the spatial query are divided by height (y) and width (x) of the anchor."""
    decoder = make_decoder(DABDecoder)
    spatial, content = random(2, 2, QUERIES, CHANNELS)
    size = make_queries(DABDecoder).reference[..., 2:]
    whole = decoder._modulate(spatial, content, size)
    half_as_wide = decoder._modulate(spatial, content, size * torch.tensor([0.5, 1.0]))
    y, x = CHANNELS // 2, slice(CHANNELS // 2, None)
    torch.testing.assert_close(half_as_wide[..., :y], whole[..., :y])
    torch.testing.assert_close(half_as_wide[..., x], 2 * whole[..., x])
    assert decoder._modulate(spatial, content, torch.zeros_like(size)).isfinite().all()


class UnchangedContent(nn.Module):
    def forward(self, content, *_):
        return content


def test_anchors_are_detached_between_layers():
    """A layer's box trains the box head of its own and the one before, as the code has it."""
    decoder = make_decoder(DABDecoder)
    decoder.layers = nn.ModuleList([UnchangedContent() for _ in range(3)])
    reference = make_queries(DABDecoder).reference.requires_grad_()
    boxes = decoder(make_queries(DABDecoder, reference=reference), make_memory()).boxes
    for layer, is_reached in enumerate([True, True, False]):
        (gradient,) = torch.autograd.grad(
            boxes[layer].sum(), reference, retain_graph=True, allow_unused=True
        )
        assert (gradient is not None and bool(gradient.any())) == is_reached


@pytest.mark.parametrize("kind", [ConditionalDecoder, DABDecoder])
def test_layers_share_their_heads(kind):
    decoder = make_decoder(kind)
    assert decoder.num_layers == 3
    names = {name for name, _ in decoder.named_parameters() if "heads" in name}
    assert {name.split(".layers")[0] for name in names} == {
        "class_heads.0.weight",
        "class_heads.0.bias",
        "box_heads.0",
    }
    # Only the first layer adds positional queries to its cross-attention.
    added = [layer.cross_attention.query_position is not None for layer in decoder.layers]
    assert added == [True, False, False]


@pytest.mark.parametrize("kind", [ConditionalDecoder, DABDecoder])
def test_a_decoder_of_one_layer_trains_all_its_parameters(kind):
    decoder = kind(num_classes=3, num_layers=1, **SIZES).to(DEVICE).double()
    predictions = decoder(make_queries(kind), make_memory())
    (predictions.boxes.sum() + predictions.logits.sum()).backward()
    assert [name for name, p in decoder.named_parameters() if p.grad is None] == []


def test_parts_that_do_not_fit_are_refused():
    memory = make_memory()
    with pytest.raises(ConfigError, match="needs positional queries but the query sources give no"):
        make_decoder(ConditionalDecoder)(make_queries(ConditionalDecoder, position=None), memory)
    with pytest.raises(ConfigError, match="also give some: use AnchorQueries"):
        make_decoder(DABDecoder)(make_queries(ConditionalDecoder), memory)
    for kind in (ConditionalDecoder, DABDecoder):
        with pytest.raises(ConfigError, match="does not give: take TransformerEncoder"):
            make_decoder(kind)(make_queries(kind), random_memory())


def test_learned_queries():
    # An exported graph has tokens of a batch, but sizes of one image.
    memory = make_memory()
    images = dataclasses.replace(memory.geometry, image_sizes=IMAGES[:1])
    memory = dataclasses.replace(memory, levels=dataclasses.replace(memory.levels, images=images))
    anchors, points = (
        source(num_queries=7, embed_dim=CHANNELS).to(DEVICE).double()
        for source in (AnchorQueries, PointQueries)
    )
    group = anchors(memory)
    assert group.position is None and group.targets is None and group.name == "matching"
    torch.testing.assert_close(group.reference[1], anchors.anchors.weight.sigmoid())
    assert group.content.shape == (2, 7, CHANNELS) and not group.content.any()
    group.reference.sum().backward()
    assert anchors.anchors.weight.grad.all()

    group = points(memory)
    torch.testing.assert_close(group.position[1], points.position.weight)
    assert group.content.shape == (2, 7, CHANNELS) and not group.content.any()
    assert (group.reference[..., 2:] == 0.5).all()
    expected = points.point_head(points.position.weight).sigmoid()
    torch.testing.assert_close(group.reference[0, :, :2], expected)
    group.reference.sum().backward()
    assert points.position.weight.grad.any() and points.point_head[0].weight.grad.any()
