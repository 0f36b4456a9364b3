"""Names and tensors of Swin and ViT, from the reference's to ours and back."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.swin import PatchMerging

from co_detr.checkpoint.official_table import (
    DroppedRow,
    cat_to_unfold_order,
    has_mmdet_swin,
    transformer_backbone_rows,
    unfold_to_cat_order,
)
from co_detr.modeling import ChannelMapper
from co_detr.modeling.backbones import ViTPyramid
from tests.modeling.backbone_builders import TINY_SWIN, on_meta, tiny_swin, tiny_vit

pytestmark = pytest.mark.cpu_only("parts by hand; models with them run on the device")

HEADS = TINY_SWIN["num_heads"]
DEPTHS = TINY_SWIN["depths"]


def official_swin_shapes(outputs=(0, 2), width=8, window=3):
    """Written down from the classes of the reference (names of the original Swin)."""
    shapes = {
        "patch_embed.proj.weight": (width, 3, 4, 4),
        "patch_embed.proj.bias": (width,),
    } | norm("patch_embed.norm", width)
    for stage, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
        c = width * 2**stage
        for block in range(depth):
            prefix = f"layers.{stage}.blocks.{block}"
            shapes |= norm(f"{prefix}.norm1", c) | norm(f"{prefix}.norm2", c)
            shapes |= linear(f"{prefix}.attn.qkv", c, 3 * c) | linear(f"{prefix}.attn.proj", c, c)
            shapes[f"{prefix}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads)
            shapes[f"{prefix}.attn.relative_position_index"] = (window**2, window**2)
            shapes |= linear(f"{prefix}.mlp.fc1", c, 4 * c) | linear(f"{prefix}.mlp.fc2", 4 * c, c)
        if stage < len(DEPTHS) - 1:
            shapes |= norm(f"layers.{stage}.downsample.norm", 4 * c)
            shapes[f"layers.{stage}.downsample.reduction.weight"] = (2 * c, 4 * c)
    for stage in outputs:
        shapes |= norm(f"norm{stage}", width * 2**stage)
    return {f"backbone.{name}": shape for name, shape in shapes.items()}


def mmdet_swin_shapes():
    """The same tensors by the names of mmdet's class."""
    replaced = (
        ("patch_embed.proj.", "patch_embed.projection."),
        ("layers.", "stages."),
        (".attn.", ".attn.w_msa."),
        (".mlp.fc1.", ".ffn.layers.0.0."),
        (".mlp.fc2.", ".ffn.layers.1."),
    )
    shapes = {}
    for name, shape in official_swin_shapes().items():
        for old, new in replaced:
            name = name.replace(old, new)
        shapes[name] = shape
    return shapes


def official_vit_shapes(blocks, window, side, *, whole=0, c=32, hidden=85, out=8):
    """ViT and its neck; ``blocks`` says which are windowed, ``side`` counts pretrained positions,
    ``whole`` is the side of the table for whole maps, if there is one."""
    head = c // 2
    shapes = {"pos_embed": (1, 1 + side * side, c), "patch_embed.proj.weight": (c, 3, 16, 16)}
    shapes |= {"patch_embed.proj.bias": (c,)} | norm("out_norm", c)

    def rope(prefix, length):
        return {f"{prefix}.freqs_{part}": (length**2, head) for part in ("cos", "sin")}

    shapes |= rope("rope_win", window) | (rope("rope_glb", whole) if whole else {})
    for number, windowed in enumerate(blocks):
        prefix = f"blocks.{number}"
        shapes |= norm(f"{prefix}.norm1", c) | norm(f"{prefix}.norm2", c)
        shapes |= {f"{prefix}.attn.{name}_proj.weight": (c, c) for name in "qkv"}
        shapes |= {f"{prefix}.attn.{name}_bias": (c,) for name in "qv"}
        shapes |= linear(f"{prefix}.attn.proj", c, c)
        if windowed or whole:
            shapes |= rope(f"{prefix}.attn.rope", window if windowed else whole)
        shapes |= linear(f"{prefix}.mlp.w1", c, hidden) | linear(f"{prefix}.mlp.w2", c, hidden)
        shapes |= norm(f"{prefix}.mlp.ffn_ln", hidden) | linear(f"{prefix}.mlp.w3", hidden, c)
    shapes = {f"backbone.{name}": shape for name, shape in shapes.items()}
    # Number in the sequence, kernel, input and output width of every convolution.
    last_two = {"p4": 0, "p3": 4, "p2": 8, "p5": 1, "p6": 4}
    before = {"p4": c, "p3": c // 2, "p2": c // 4, "p5": c, "p6": c}
    convs = {
        name: [(i, 1, before[name], out), (i + 3, 3, out, out)] for name, i in last_two.items()
    }
    convs["p3"] += [(1, 3, c, c // 2)]
    convs["p2"] += [(1, 3, c, c // 2), (5, 3, c // 2, c // 4)]
    convs["p6"] += [(1, 3, c, c)]
    for level, layers in convs.items():
        for number, kernel, inputs, outputs in layers:
            shapes[f"neck.{level}.{number}.weight"] = (outputs, inputs, kernel, kernel)
            shapes |= norm(f"neck.{level}.{number + 1}", outputs)
    return shapes


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def linear(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def synthetic(shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def to_ours(rows, official):
    converted = {}
    for key, value in official.items():
        if any(isinstance(row, DroppedRow) and row.knows(key) for row in rows):
            continue
        others = (row for row in rows if not isinstance(row, DroppedRow))
        row = next(row for row in others if row.to_ours(key) is not None)
        converted[row.to_ours(key)] = value if row.rewrite is None else row.rewrite(value)
    return converted


def to_official(rows, ours):
    converted = {}
    for key, value in ours.items():
        others = (row for row in rows if not isinstance(row, DroppedRow))
        row = next(row for row in others if row.to_official(key) is not None)
        converted[row.to_official(key)] = value if row.restore is None else row.restore(value)
    for row in rows:
        if isinstance(row, DroppedRow):
            beside = {row.restored_beside(key): value for key, value in converted.items()}
            converted |= {key: row.restore(value) for key, value in beside.items() if key}
    return converted


def assert_round_trip(rows, official, model):
    """All names and shapes of the model, and back to what we came from."""
    ours = to_ours(rows, official)
    expected = {f"backbone.{key}": tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: value.shape for key, value in ours.items()} == {
        key: shape for key, shape in expected.items() if not is_of_the_mapper(key)
    }
    back = to_official(rows, ours)
    assert back.keys() == official.keys()
    for key, value in official.items():
        assert torch.equal(back[key], value) or ".freqs_" in key, key
    return back


def is_of_the_mapper(key):
    return key.startswith(("backbone.lateral_convs.", "backbone.extra_convs."))


def mapped_tiny_swin():
    return ChannelMapper(
        bottom_up=tiny_swin(), in_features=["stage0", "stage2"], out_channels=8, num_groups=2
    )


def test_swin_of_the_reference():
    mapper = mapped_tiny_swin()
    official = synthetic(official_swin_shapes())
    assert not has_mmdet_swin(official)
    assert_round_trip(transformer_backbone_rows(mapper), official, mapper)


def test_swin_of_mmdet():
    mapper = mapped_tiny_swin()
    official = synthetic(mmdet_swin_shapes())
    assert has_mmdet_swin(official)
    assert_round_trip(transformer_backbone_rows(mapper, mmdet_swin=True), official, mapper)
    # The reference's names are given back unless mmdet's are asked for; both are read.
    rows = transformer_backbone_rows(mapper)
    assert to_official(rows, to_ours(rows, official)).keys() == official_swin_shapes().keys()


@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_patch_merging_of_mmdet_is_ours_after_the_rewrite(size):
    channels, (height, width) = 3, size
    tokens = torch.randn(2, height * width, channels, dtype=torch.float64)
    reduction = torch.randn(2 * channels, 4 * channels, dtype=torch.float64)
    weight, bias = torch.randn(2, 4 * channels, dtype=torch.float64)

    maps = tokens.transpose(1, 2).unflatten(2, size)
    unfolded = F.unfold(F.pad(maps, (0, width % 2, 0, height % 2)), kernel_size=2, stride=2)
    normed = F.layer_norm(unfolded.transpose(1, 2), (4 * channels,), weight, bias)
    expected = F.linear(normed, reduction)

    ours = PatchMerging(channels).double()
    with torch.no_grad():
        ours.reduction.weight.copy_(unfold_to_cat_order(reduction))
        ours.norm.weight.copy_(unfold_to_cat_order(weight))
        ours.norm.bias.copy_(unfold_to_cat_order(bias))
        torch.testing.assert_close(ours(tokens, height, width), expected)


def test_orders_of_patch_merging_are_inverse():
    value = torch.arange(24).view(2, 12)
    assert torch.equal(cat_to_unfold_order(unfold_to_cat_order(value)), value)
    assert torch.equal(unfold_to_cat_order(cat_to_unfold_order(value)), value)
    # One row of three channels: position 0 of all channels, then position 2 (the one below), ...
    assert unfold_to_cat_order(value[0]).tolist() == [0, 4, 8, 2, 6, 10, 1, 5, 9, 3, 7, 11]


@pytest.mark.parametrize(("square_size", "whole"), [(0, 0), (128, 8)])
def test_vit_of_the_reference(square_size, whole):
    pyramid = ViTPyramid(bottom_up=tiny_vit(square_size=square_size), out_channels=8)
    shapes = official_vit_shapes([True, False, True], window=3, side=4, whole=whole)
    back = assert_round_trip(transformer_backbone_rows(pyramid), synthetic(shapes), pyramid)
    assert {key: value.shape for key, value in back.items()} == shapes


def test_rotary_tables_are_given_back_as_the_reference_computes_them():
    pyramid = ViTPyramid(bottom_up=tiny_vit(square_size=128), out_channels=8)
    shapes = official_vit_shapes([True, False, True], window=3, side=4, whole=8)
    rows = transformer_backbone_rows(pyramid)
    back = to_official(rows, to_ours(rows, synthetic(shapes)))
    for prefix, side in (("rope_win", 3), ("rope_glb", 8), ("blocks.1.attn.rope", 8)):
        # 8 channels for the row and 8 for the column, in pairs.
        frequency = torch.tensor([10000 ** -(pair / 4) for pair in range(4)]).repeat_interleave(2)
        angle = torch.arange(side)[:, None] / side * 16 * frequency
        rows_then_columns = [angle[:, None].expand(-1, side, -1), angle[None].expand(side, -1, -1)]
        expected = torch.cat(rows_then_columns, dim=-1).flatten(0, 1)
        torch.testing.assert_close(back[f"backbone.{prefix}.freqs_cos"], expected.cos())
        torch.testing.assert_close(back[f"backbone.{prefix}.freqs_sin"], expected.sin())


def test_a_vit_with_other_windows_is_noticed():
    """Windows show in no parameter, but in the blocks that hold a table of the window."""
    pyramid = ViTPyramid(bottom_up=tiny_vit(global_blocks=[0]), out_channels=8)
    rows = transformer_backbone_rows(pyramid)
    official = synthetic(official_vit_shapes([True, False, True], window=3, side=4))
    with pytest.raises(StopIteration):
        to_ours(rows, official)


@pytest.mark.parametrize("name", ["mapped_swin_t", "mapped_swin_l", "mapped_vit_l"])
def test_every_full_size_parameter_has_a_name_on_both_sides(name):
    backbone = on_meta(name)
    rows = transformer_backbone_rows(backbone)
    keys = [f"backbone.{key}" for key in backbone.state_dict()]
    ours = {key: torch.zeros(()) for key in keys if not is_of_the_mapper(key)}
    shared = [row for row in rows if not isinstance(row, DroppedRow)]
    plain = to_official(shared, ours)
    assert len(plain) == len(ours)
    assert to_ours(shared, plain).keys() == ours.keys()


def test_a_resnet_has_no_rows_here():
    assert transformer_backbone_rows(on_meta("mapped_resnet50")) == []
