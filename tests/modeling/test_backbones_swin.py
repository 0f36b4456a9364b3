"""Swin: against its definition, token by token, and against other implementations."""

import math

import pytest
import torch
from detectron2.modeling.backbone.swin import SwinTransformer as Detectron2Swin
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin

from co_detr.errors import ConfigError
from co_detr.modeling.backbones import SwinTransformer
from co_detr.modeling.backbones.swin import SwinStage, drop_paths
from tests.modeling.backbone_builders import (
    TINY_SWIN,
    backbone_node,
    on_meta,
    outputs_and_gradients,
    randomize_all,
    tiny_swin,
)

pytestmark = pytest.mark.cpu_only("parts by hand; models with them run on the device")


@pytest.mark.parametrize("size", [(48, 64), (45, 61), (4, 3)])
def test_shapes_strides_and_channels(size):
    model = tiny_swin(out_features=["stage0", "stage1", "stage2"])
    shapes = model.output_shape()
    assert {name: (shape.channels, shape.stride) for name, shape in shapes.items()} == {
        "stage0": (8, 4),
        "stage1": (16, 8),
        "stage2": (32, 16),
    }
    maps = model(torch.randn(2, 3, *size))
    assert list(maps) == list(shapes)
    for name, level_map in maps.items():
        sides = [math.ceil(side / shapes[name].stride) for side in size]
        assert level_map.shape == (2, shapes[name].channels, *sides)


def test_only_outputs_are_normalized_and_returned_in_order():
    model = tiny_swin(out_features=["stage2", "stage0"])
    assert list(model(torch.randn(1, 3, 32, 32))) == ["stage0", "stage2"]
    assert [name for name, _ in model.named_children() if name.startswith("norm")] == [
        "norm0",
        "norm2",
    ]


def naive_block(block, tokens, shift):
    """A block on one map ``(H, W, C)``, one token after the other.

    Padded with zeros after the norm; a token sees those of its window on the shifted grid, where
    windows do not wrap around.
    """
    height, width, channels = tokens.shape
    window, attention = block.window_size, block.attn
    heads = attention.num_heads
    normed = block.norm1(tokens)
    cells = [
        (y, x)
        for y in range(math.ceil(height / window) * window)
        for x in range(math.ceil(width / window) * window)
    ]
    zero = torch.zeros(channels, dtype=tokens.dtype)
    values = {
        (y, x): attention.qkv(normed[y, x] if y < height and x < width else zero) for y, x in cells
    }
    attended = torch.zeros_like(tokens)
    for y, x in cells:
        if y >= height or x >= width:
            continue
        seen = [
            (v, u)
            for v, u in cells
            if (v - shift) // window == (y - shift) // window
            and (u - shift) // window == (x - shift) // window
        ]
        per_head = []
        for head in range(heads):
            part = slice(head * channels // heads, (head + 1) * channels // heads)
            query = values[y, x][:channels][part]
            scores = []
            for v, u in seen:
                key = values[v, u][channels : 2 * channels][part]
                offset = (y - v + window - 1) * (2 * window - 1) + (x - u + window - 1)
                bias = attention.relative_position_bias_table[offset, head]
                scores.append(query @ key / math.sqrt(channels // heads) + bias)
            weights = torch.stack(scores).softmax(0)
            per_head.append(
                sum(w * values[s][2 * channels :][part] for w, s in zip(weights, seen, strict=True))
            )
        attended[y, x] = attention.proj(torch.cat(per_head))
    tokens = tokens + attended
    return tokens + block.mlp(block.norm2(tokens))


@pytest.mark.parametrize("size", [(5, 7), (6, 6), (2, 3)])  # padded; whole windows; one window
def test_a_stage_is_its_definition(size):
    stage = SwinStage(
        channels=8,
        num_heads=2,
        window_size=3,
        drop_path=drop_paths(0.0, 2),
        merge=False,
        activation_checkpointing=False,
    ).double()
    randomize_all(stage)
    tokens = torch.randn(1, size[0] * size[1], 8, dtype=torch.float64)
    with torch.no_grad():
        found = stage(tokens, *size)
        expected = tokens[0].unflatten(0, size)
        for block, shift in zip(stage.blocks, (0, 1), strict=True):
            expected = naive_block(block, expected, shift)
    torch.testing.assert_close(found[0].unflatten(0, size), expected, rtol=1e-10, atol=1e-10)


def from_torchvision(weights):
    """Names of torchvision's Swin -> ours."""
    renamed = {}
    for key, value in weights.items():
        if not key.startswith("features.") or key.endswith("relative_position_index"):
            continue  # the classifier; a flattened copy of the same numbers
        _, part, rest = key.split(".", 2)
        part = int(part)
        if part == 0:
            rest = rest.replace("0.", "patch_embed.proj.").replace("2.", "patch_embed.norm.")
        elif part % 2:
            rest = rest.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
            rest = f"layers.{part // 2}.blocks.{rest}"
        else:
            rest = f"layers.{part // 2 - 1}.downsample.{rest}"
        renamed[rest] = value
    return renamed


def test_torchvisions_swin_computes_the_same():
    # Larger than the window in every stage: torchvision does not shift a single window.
    images = torch.randn(2, 3, 72, 100, dtype=torch.float64)
    peer = TorchvisionSwin([4, 4], 8, [2, 2, 2], [1, 2, 4], [3, 3], num_classes=1).double().eval()
    randomize_all(peer)
    ours = tiny_swin(out_features=["stage0", "stage1", "stage2"]).double().eval()
    missing, unexpected = ours.load_state_dict(from_torchvision(peer.state_dict()), strict=False)
    assert not unexpected
    assert all(key.endswith("index") or key.startswith("norm") for key in missing)
    with torch.no_grad():
        found = ours(images)
        tokens = images
        for number, part in enumerate(peer.features):
            tokens = part(tokens)
            if number % 2:
                stage = number // 2
                expected = getattr(ours, f"norm{stage}")(tokens).permute(0, 3, 1, 2)
                torch.testing.assert_close(found[f"stage{stage}"], expected)


def test_detectron2s_swin_has_the_same_names_and_computes_the_same():
    peer = Detectron2Swin(**TINY_SWIN, drop_path_rate=0.0, out_indices=(0, 2)).eval()
    randomize_all(peer)
    ours = tiny_swin().eval()
    ours.load_state_dict(peer.state_dict())
    images = torch.randn(1, 3, 50, 70)
    with torch.no_grad():
        found, expected = ours(images), peer(images)
    assert torch.equal(found["stage0"], expected["p0"])
    assert torch.equal(found["stage2"], expected["p2"])


def test_checkpointing_changes_no_bit():
    images = torch.randn(2, 3, 45, 61)
    plain = outputs_and_gradients(tiny_swin(drop_path_rate=0.5), images)
    saved = outputs_and_gradients(
        tiny_swin(drop_path_rate=0.5, activation_checkpointing=True), images
    )
    assert plain.keys() == saved.keys() and None not in saved.values()
    assert all(torch.equal(value, saved[name]) for name, value in plain.items())


def test_a_checkpointed_block_remembers_the_size_of_its_map():
    model = tiny_swin(activation_checkpointing=True)
    first, second = torch.randn(1, 3, 45, 61), torch.randn(1, 3, 64, 32)
    expected = outputs_and_gradients(model, first)
    model.zero_grad(set_to_none=True)
    maps = model(first)
    model(second)
    sum(level_map.square().sum() for level_map in maps.values()).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name])


def test_drop_path_grows_with_depth():
    model = tiny_swin(drop_path_rate=0.5)
    rates = [block.drop_path.p for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_drop_path_is_per_image_and_rests_in_eval():
    (drop_path,) = drop_paths(0.0, 1)
    drop_path.p = 0.25
    torch.manual_seed(0)
    branch = torch.ones(64, 2, 3)
    kept = drop_path(branch)
    per_image = kept[:, 0, 0]
    assert torch.equal(kept, per_image[:, None, None].expand_as(kept))
    assert {round(value, 4) for value in per_image.tolist()} == {0.0, round(1 / 0.75, 4)}
    assert torch.equal(drop_path.eval()(branch), branch)


def test_a_block_without_its_branches_is_the_identity():
    stage = tiny_swin(drop_path_rate=0.5).layers[0].train()
    for block in stage.blocks:
        block.drop_path.p = 1.0
    tokens = torch.randn(1, 20, 8)
    assert torch.equal(stage(tokens, 4, 5), tokens)
    assert not torch.equal(stage.eval()(tokens, 4, 5), tokens)


def test_initial_weights():
    torch.manual_seed(0)
    model = SwinTransformer(
        **TINY_SWIN | {"embed_dim": 64}, drop_path_rate=0.0, out_features=["stage2"]
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize(
    ("name", "millions"),  # parameters of the published classifier
    [("mapped_swin_t", 28), ("mapped_swin_s", 50), ("mapped_swin_b", 88), ("mapped_swin_l", 197)],
)
def test_full_size(name, millions):
    mapper = on_meta(name)
    numbers = backbone_node(name).bottom_up
    with torch.device("meta"):
        peer = TorchvisionSwin(
            patch_size=[4, 4],
            embed_dim=numbers.embed_dim,
            depths=list(numbers.depths),
            num_heads=list(numbers.num_heads),
            window_size=[numbers.window_size] * 2,
        )
    assert round(count(peer) / 1e6) == millions
    # No classifier and no norm before it, but a norm of each output.
    norms = sum(2 * shape.channels for shape in mapper.bottom_up.output_shape().values())
    assert count(mapper.bottom_up) == count(peer.features) + norms
    assert [shape.stride for shape in mapper.output_shape().values()] == [8, 16, 32, 64]
    assert mapper.size_divisibility == 0


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_errors_name_the_mend():
    with pytest.raises(ConfigError, match="3 stages by depths but 2 by num_heads"):
        tiny_swin(num_heads=[1, 2])
    with pytest.raises(ConfigError, match=r"no output \['res5'\], only \['stage0', 'stage1'"):
        tiny_swin(out_features=["stage1", "res5"])
