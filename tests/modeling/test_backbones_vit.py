"""The EVA-02 style vision transformer and its pyramid."""

import cmath

import pytest
import torch
import torch.nn.functional as F
from detectron2.solver.build import get_default_optimizer_params
from detectron2.structures import ImageList

from co_detr.engine.optim import LearningRateFactor
from co_detr.errors import ConfigError
from co_detr.modeling.backbones import ViTPyramid
from co_detr.modeling.backbones.swin import drop_paths
from co_detr.modeling.backbones.vit import RotaryTable, SwiGLU, ViTBlock
from tests.modeling.backbone_builders import (
    on_meta,
    outputs_and_gradients,
    randomize_all,
    tiny_swin,
    tiny_vit,
)

pytestmark = pytest.mark.cpu_only("parts by hand; models with them run on the device")


def table_of(height, width, head_dim, dtype=torch.float64):
    return RotaryTable.of_map(height, width, head_dim, device=torch.device("cpu"), dtype=dtype)


def test_rotary_positions_are_rotations_of_complex_numbers():
    height, width, head_dim = 3, 5, 16
    heads = torch.randn(2, 4, height * width, head_dim, dtype=torch.float64)
    found = table_of(height, width, head_dim).rotate(heads)
    pairs = head_dim // 2  # the first half of them turns with the row, the others with the column
    for y in range(height):
        for x in range(width):
            for pair in range(pairs):
                share = y / height if pair < pairs // 2 else x / width
                frequency = 10000 ** -((pair % (pairs // 2)) / (pairs // 2))
                turn = cmath.exp(1j * 16 * share * frequency)
                token = heads[..., y * width + x, 2 * pair : 2 * pair + 2]
                expected = torch.view_as_complex(token.contiguous()) * turn
                actual = found[..., y * width + x, 2 * pair : 2 * pair + 2]
                torch.testing.assert_close(torch.view_as_complex(actual.contiguous()), expected)


def test_rotary_positions_in_half_precision_are_rounded_once():
    heads = torch.randn(1, 1, 12, 16)
    table = table_of(3, 4, 16, torch.float32)
    found = table.rotate(heads.bfloat16())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, table.rotate(heads.bfloat16().float()).bfloat16())


def test_swiglu_by_hand():
    layer = SwiGLU(2, 3).double()
    randomize_all(layer)
    x = torch.randn(2, dtype=torch.float64)
    gate, linear = layer.w1.weight @ x + layer.w1.bias, layer.w2.weight @ x + layer.w2.bias
    hidden = gate / (1 + torch.exp(-gate)) * linear
    mean = hidden.mean()
    hidden = (hidden - mean) / torch.sqrt(((hidden - mean) ** 2).mean() + 1e-6)
    hidden = hidden * layer.ffn_ln.weight + layer.ffn_ln.bias
    torch.testing.assert_close(layer(x), layer.w3.weight @ hidden + layer.w3.bias)


def make_block(window_size):
    block = ViTBlock(
        channels=16,
        num_heads=2,
        mlp_ratio=2.0,
        window_size=window_size,
        drop_path=drop_paths(0.0, 1)[0],
    ).double()
    randomize_all(block)
    return block


def naive_attention(attention, x):
    """One map ``(H, W, C)`` of which all tokens see all, by the formula."""
    height, width, channels = x.shape
    tokens, table = x.reshape(-1, channels), table_of(height, width, channels // 2)
    results = []
    for head in range(2):
        part = slice(head * channels // 2, (head + 1) * channels // 2)
        query = table.rotate((tokens @ attention.q_proj.weight.T + attention.q_proj.bias)[:, part])
        key = table.rotate((tokens @ attention.k_proj.weight.T)[:, part])
        value = (tokens @ attention.v_proj.weight.T + attention.v_proj.bias)[:, part]
        results.append((query @ key.T / (channels // 2) ** 0.5).softmax(1) @ value)
    merged = torch.cat(results, dim=1) @ attention.proj.weight.T + attention.proj.bias
    return merged.unflatten(0, (height, width))


def test_global_attention_by_the_formula():
    block = make_block(0)
    x = torch.randn(1, 3, 5, 16, dtype=torch.float64)
    found = block.attn(x, table_of(3, 5, 8))
    torch.testing.assert_close(found[0], naive_attention(block.attn, x[0]))


def test_a_window_as_large_as_the_map_is_global_attention():
    windowed, whole = make_block(4), make_block(0)
    x, table = torch.randn(2, 4, 4, 16, dtype=torch.float64), table_of(4, 4, 8)
    torch.testing.assert_close(windowed(x, table), whole(x, table))


def test_windows_see_their_own_tokens_and_the_padding():
    block = make_block(3)
    x = torch.randn(1, 4, 5, 16, dtype=torch.float64)
    padded = F.pad(block.norm1(x), (0, 0, 0, 1, 0, 2))[0]  # 6 x 6, zeros after the norm
    attended = torch.zeros_like(padded)
    for y in (0, 3):
        for x_start in (0, 3):
            window = (slice(y, y + 3), slice(x_start, x_start + 3))
            attended[window] = naive_attention(block.attn, padded[window])
    expected = x[0] + attended[:4, :5]
    expected = expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(block(x, table_of(3, 3, 8))[0], expected)


def test_blocks_get_the_positions_of_their_window_or_of_the_map():
    model = tiny_vit().double().eval()
    assert [block.window_size for block in model.blocks] == [3, 0, 3]
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        x = model.patch_embed(images)
        positions = model.pos_embed[0, 1:].unflatten(0, (4, 4)).permute(2, 0, 1)[None]
        positions = F.interpolate(positions, size=(4, 6), mode="bicubic", align_corners=False)
        x = x + positions.permute(0, 2, 3, 1)
        for block, size in zip(model.blocks, [(3, 3), (4, 6), (3, 3)], strict=True):
            x = block(x, table_of(*size, 16))
        expected = model.out_norm(x).permute(0, 3, 1, 2)
        (found,) = model(images).values()
    torch.testing.assert_close(found, expected)


def test_images_of_the_pretraining_size_use_the_positions_as_they_are():
    model = tiny_vit(depth=0, global_blocks=[]).eval()
    x = model.patch_embed(torch.zeros(1, 3, 64, 64)) + model.pos_embed[:, 1:].unflatten(1, (4, 4))
    (found,) = model(torch.zeros(1, 3, 64, 64)).values()
    assert torch.equal(found, model.out_norm(x).permute(0, 3, 1, 2))


def test_checkpointing_changes_no_bit():
    images = torch.randn(2, 3, 64, 96)
    plain = outputs_and_gradients(tiny_vit(drop_path_rate=0.5), images)
    saved = outputs_and_gradients(
        tiny_vit(drop_path_rate=0.5, activation_checkpointing=True), images
    )
    assert plain.keys() == saved.keys() and None not in saved.values()
    assert all(torch.equal(value, saved[name]) for name, value in plain.items())


def test_drop_path_grows_with_depth():
    rates = [block.drop_path.p for block in tiny_vit(drop_path_rate=0.4).blocks]
    assert rates == pytest.approx([0.0, 0.2, 0.4])


def test_a_block_without_its_branches_is_the_identity():
    block, x = make_block(3).train(), torch.randn(1, 4, 5, 16, dtype=torch.float64)
    block.drop_path.p = 1.0
    assert torch.equal(block(x, table_of(3, 3, 8)), x)


def test_odd_images_are_padded_by_detectron2():
    images = [torch.randn(3, 45, 61), torch.randn(3, 70, 33)]
    for settings, size in (({}, (96, 64)), ({"square_size": 128}, (128, 128))):
        pyramid = ViTPyramid(bottom_up=tiny_vit(**settings), out_channels=8)
        batch = ImageList.from_tensors(
            images, pyramid.size_divisibility, padding_constraints=pyramid.padding_constraints
        )
        assert batch.tensor.shape[-2:] == size
        maps, shapes = pyramid(batch.tensor), pyramid.output_shape()
        assert list(maps) == list(shapes) == ["p2", "p3", "p4", "p5", "p6"]
        for level, (name, level_map) in enumerate(maps.items(), start=2):
            assert (shapes[name].channels, shapes[name].stride) == (8, 2**level)
            assert level_map.shape == (2, 8, *(-(-side // 2**level) for side in size))


def test_a_level_of_the_pyramid_by_hand():
    pyramid = ViTPyramid(bottom_up=tiny_vit(), out_channels=8).double()
    randomize_all(pyramid)
    features = torch.randn(1, 32, 4, 6, dtype=torch.float64)

    def norm(x, layer):
        x = x - x.mean(1, keepdim=True)
        x = x / torch.sqrt((x**2).mean(1, keepdim=True) + 1e-6)
        return x * layer.weight[:, None, None] + layer.bias[:, None, None]

    level = pyramid.levels["p3"]
    x = features.repeat_interleave(2, 2).repeat_interleave(2, 3)
    x = F.gelu(norm(F.conv2d(x, level[1].weight, padding=1), level[2]))
    x = F.gelu(norm(F.conv2d(x, level[4].weight), level[5]))
    x = norm(F.conv2d(x, level[7].weight, padding=1), level[8])
    torch.testing.assert_close(level(features), x)

    level = pyramid.levels["p6"]
    x = F.max_pool2d(features, 3, 2, 1)
    x = F.gelu(norm(F.conv2d(x, level[1].weight, stride=2, padding=1), level[2]))
    x = F.gelu(norm(F.conv2d(x, level[4].weight), level[5]))
    x = norm(F.conv2d(x, level[7].weight, padding=1), level[8])
    torch.testing.assert_close(level(features), x)


@pytest.mark.parametrize("name", ["mapped_vit_l", "mapped_vit_l_lsj"])
def test_full_size(name):
    pyramid = on_meta(name)
    vit = pyramid.bottom_up
    attention = 4 * 1024**2 + 3 * 1024  # keys have no bias
    feed_forward = 2 * (1024 * 2730 + 2730) + 2 * 2730 + 2730 * 1024 + 1024
    embeddings = 3 * 16 * 16 * 1024 + 1024 + (1 + 32 * 32) * 1024
    expected = 24 * (attention + feed_forward + 4 * 1024) + embeddings + 2 * 1024
    assert sum(parameter.numel() for parameter in vit.parameters()) == expected == 304_238_528
    assert [shape.stride for shape in pyramid.output_shape().values()] == [4, 8, 16, 32, 64]
    every = 4 if name == "mapped_vit_l" else 3
    windows = [block.window_size for block in vit.blocks]
    assert windows == [0 if (i + 1) % every == 0 else vit.window_size for i in range(24)]


def test_layer_decay_by_hand():
    factor = LearningRateFactor(factor=1.0, layer_decay=0.5, depths=3)
    pyramid = ViTPyramid(bottom_up=tiny_vit(), out_channels=8)
    model = torch.nn.ModuleDict({"backbone": pyramid, "head": torch.nn.Linear(2, 2)})
    groups = get_default_optimizer_params(
        model, base_lr=1.0, weight_decay=0.1, weight_decay_bias=0.0, lr_factor_func=factor
    )
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if "pos_embed" in name or "patch_embed" in name:
            expected = 0.0625
        elif ".blocks." in name:
            expected = {"0": 0.125, "1": 0.25, "2": 0.5}[name.split(".blocks.")[1][0]]
        else:
            expected = 1.0  # the last norm, the pyramid, the head
        assert rates[id(parameter)] == expected, name


def test_layer_decay_of_the_reference():
    factor = LearningRateFactor(factor=1.0, parts=(), layer_decay=0.8, depths=[24])
    assert factor("backbone.bottom_up.patch_embed.proj.weight") == pytest.approx(0.8**25)
    assert factor("backbone.bottom_up.blocks.0.norm1.weight") == pytest.approx(0.8**24)
    assert factor("backbone.bottom_up.blocks.23.mlp.w1.weight") == pytest.approx(0.8)
    assert factor("backbone.levels.p2.1.weight") == factor("decoder.blocks.0.weight") == 1.0


def test_errors_name_the_mend():
    with pytest.raises(ConfigError, match="divisible by 4 \\* num_heads, got 32 and 3"):
        tiny_vit(num_heads=3)
    with pytest.raises(ConfigError, match=r"no blocks \[3\] of global_blocks, only 0..2"):
        tiny_vit(global_blocks=[1, 3])
    with pytest.raises(ConfigError, match="multiples of patch_size 16, got 32 and 100"):
        tiny_vit(square_size=100)
    with pytest.raises(ValueError, match=r"multiples of 16, got \(1, 3, 40, 64\)"):
        tiny_vit()(torch.zeros(1, 3, 40, 64))
    with pytest.raises(ConfigError, match="one map of stride 16.*use ChannelMapper"):
        ViTPyramid(bottom_up=tiny_swin(), out_channels=8)
