"""The single-scale encoders, decoders and queries against the ports in transformers.

Random weights, no download. Where a port differs from its paper's code, the comparison leaves the
difference out: with intermediate losses the port of Conditional-DETR feeds normed outputs to the
next layer, so only its last layer is compared (its code feeds them as they are), and the port of
DAB-DETR bounds the inverse sigmoid by 1e-5 (its code by 1e-3), which no value here reaches.
"""

import re

import pytest
import torch
from torch import nn

from co_detr.modeling import SinePosition
from co_detr.modeling.queries import AnchorQueries, PointQueries
from co_detr.modeling.single_scale import ConditionalDecoder, DABDecoder, TransformerEncoder
from co_detr.structures import QuerySet
from tests.modeling.builders import geometry_of, randomize

transformers = pytest.importorskip("transformers")

CHANNELS, QUERIES, CLASSES = 32, 7, 3
SIZES = [(96, 160), (128, 97)]  # of a batch padded to 128 x 160
# Sine codes and softmax of the ports are float32 in places.
TOLERANCE = {"rtol": 0, "atol": 1e-5}
# Our names by those of the ports; the first match counts.
COMMON = [
    (r"model\.(encoder|decoder)\.layers\.(\d+)\.", r"\1.layers.\2."),
    (r"model\.decoder\.layernorm\.", "decoder.output_norm."),
    (r"model\.decoder\.query_scale\.layers\.0\.", "decoder.spatial_scale.0."),
    (r"model\.decoder\.query_scale\.layers\.1\.", "decoder.spatial_scale.2."),
    (r"bbox_predictor\.", "decoder.box_heads.0."),
]
CONDITIONAL = [
    (r"\.encoder_attn_layer_norm\.", ".cross_attention_norm."),
    (r"\.encoder_attn\.", ".cross_attention."),
    (r"model\.query_position_embeddings\.", "queries.position."),
    (r"model\.decoder\.ref_point_head\.layers\.0\.", "queries.point_head.0."),
    (r"model\.decoder\.ref_point_head\.layers\.1\.", "queries.point_head.2."),
    (r"class_labels_classifier\.", "decoder.class_heads.0."),
]
DAB = [
    (r"\.self_attn\.self_attn\.output_proj\.", ".self_attention.out_proj."),
    (r"\.self_attn\.self_attn_layer_norm\.", ".self_attention_norm."),
    (r"\.self_attn\.self_attn_", ".self_attention."),
    (r"\.cross_attn\.cross_attn\.output_proj\.", ".cross_attention.out_proj."),
    (r"\.cross_attn\.cross_attn_layer_norm\.", ".cross_attention_norm."),
    (r"\.cross_attn\.cross_attn_", ".cross_attention."),
    (r"model\.encoder\.query_scale\.layers\.0\.", "encoder.position_scale.0."),
    (r"model\.encoder\.query_scale\.layers\.1\.", "encoder.position_scale.2."),
    (r"model\.decoder\.ref_point_head\.", "decoder.query_position."),
    (r"model\.decoder\.ref_anchor_head\.layers\.0\.", "decoder.size_head.0."),
    (r"model\.decoder\.ref_anchor_head\.layers\.1\.", "decoder.size_head.2."),
    (r"model\.query_refpoint_embeddings\.", "queries.anchors."),
    (r"class_embed\.", "decoder.class_heads.0."),
]
PARTS = [
    (r"(encoder.*)\.self_attn_layer_norm\.", r"\1.attention_norm."),
    (r"(encoder.*)\.self_attn\.", r"\1.attention."),
    (r"\.self_attn_layer_norm\.", ".self_attention_norm."),
    (r"\.self_attn\.", ".self_attention."),
    (r"(\.mlp)?\.final_layer_norm\.", ".ffn_norm."),
    (r"(\.mlp)?\.fc([12])\.", r".ffn.linear\2."),
    (r"(\.mlp)?\.activation_fn\.", ".ffn.activation."),
    (r"\.(q|query)_(content|pos|pos_sine)_proj\.", r".query_\2."),
    (r"\.(k|key)_(content|pos)_proj\.", r".key_\2."),
    (r"(decoder.*attention)\.(v|value)_proj\.", r"\1.value."),
    (r"\.o_proj\.", ".out_proj."),
    (r"_pos_sine\.", "_spatial."),
    (r"_pos\.", "_position."),
]


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def ours(decoder, queries, temperature, **encoder):
    sizes = {"embed_dim": CHANNELS, "num_heads": 4, "num_layers": 2, "feedforward_dim": 48}
    position = SinePosition(CHANNELS, temperature=temperature, offset=0.0)
    return nn.ModuleDict(
        {
            "encoder": TransformerEncoder(position_encoding=position, **sizes, **encoder),
            "decoder": decoder(num_classes=CLASSES, **sizes),
            "queries": queries(num_queries=QUERIES, embed_dim=CHANNELS),
        }
    ).eval()


def port(name, width):
    """A tiny model of transformers with random weights."""
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in SIDE}
    config = getattr(transformers, f"{name}Config")(
        backbone_config=backbone, num_queries=QUERIES, num_labels=CLASSES, **sides, **width
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForObjectDetection")(config).double().eval()
    randomize(model, scale=0.2)
    return model


SIDE = (("layers", 2), ("ffn_dim", 48), ("attention_heads", 4))


def copy_weights(source, target, names):
    state = {}
    for name, value in source.state_dict().items():
        if "backbone" in name or "input_projection" in name or ".bbox_embed." in name:
            continue
        for pattern, replacement in [*names, *COMMON, *PARTS]:
            name = re.sub(pattern, replacement, name)
        state[name] = value
    for name in [name for name in state if ".attention.q_proj." in name]:
        parts = [state.pop(name.replace("q_proj.", f"{part}_proj.")) for part in "qkv"]
        state[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    target.load_state_dict(state)  # nothing missing, nothing left over


def run_both(source, target):
    """Outputs of the port, our memory and our predictions of one padded batch."""
    pixels, mask = torch.zeros(2, 3, 128, 160), torch.zeros(2, 128, 160)
    for image, (height, width) in enumerate(SIZES):
        pixels[image, :, :height, :width] = torch.randn(3, height, width)
        mask[image, :height, :width] = 1
    maps = []
    hook = source.model.input_projection.register_forward_hook(lambda *io: maps.append(io[-1]))
    with torch.no_grad():
        expected = source.model(pixels, pixel_mask=mask)
        detections = source(pixels, pixel_mask=mask)
        memory = target["encoder"](maps[:1], geometry_of(SIZES, (128, 160)))
        queries = QuerySet.concat([target["queries"](memory)])
        predictions = target["decoder"](queries, memory)
    hook.remove()
    assert memory.padding_mask.any() and memory.level_shapes == [(4, 5)]
    return expected, detections, memory, predictions


def test_conditional_detr():
    source = port("ConditionalDetr", {"d_model": CHANNELS})
    target = ours(ConditionalDecoder, PointQueries, temperature=10000.0)
    copy_weights(source, target, CONDITIONAL)
    expected, detections, memory, predictions = run_both(source, target)
    torch.testing.assert_close(memory.tokens, expected.encoder_last_hidden_state, **TOLERANCE)
    torch.testing.assert_close(predictions.logits[-1], detections.logits, **TOLERANCE)
    torch.testing.assert_close(predictions.boxes[-1], detections.pred_boxes, **TOLERANCE)


def test_dab_detr():
    source = port("DabDetr", {"hidden_size": CHANNELS, "output_hidden_states": True})
    target = ours(
        DABDecoder, AnchorQueries, temperature=20.0, activation=nn.PReLU, scale_position=True
    )
    copy_weights(source, target, DAB)
    expected, detections, memory, predictions = run_both(source, target)
    torch.testing.assert_close(memory.tokens, expected.encoder_last_hidden_state, **TOLERANCE)
    logits = source.class_embed(expected.intermediate_hidden_states)
    torch.testing.assert_close(predictions.logits, logits, **TOLERANCE)
    torch.testing.assert_close(predictions.boxes[-1], detections.pred_boxes, **TOLERANCE)
    # What a layer's box starts from is what the one before predicted, read without the norm.
    base = expected.reference_points.logit()
    boxes = (source.bbox_predictor(expected.intermediate_hidden_states) + base).sigmoid()
    torch.testing.assert_close(predictions.boxes, boxes, **TOLERANCE)
