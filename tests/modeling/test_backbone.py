"""ResNets of any width and the channel mapper on top of a backbone."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.backbone import BasicStem, ResNet

from co_detr.errors import ConfigError
from co_detr.modeling import ChannelMapper
from co_detr.modeling.backbones.resnet import ResNet as CheckpointedResNet
from co_detr.modeling.backbones.resnet import resnet_stages
from tests.modeling.backbone_builders import outputs_and_gradients

pytestmark = pytest.mark.cpu_only("parts by hand; models with them run on the device")

STAGES = ["res2", "res3", "res4", "res5"]


def make_resnet(out_features, **settings):
    stem = BasicStem(3, settings["stem_channels"], norm="FrozenBN")
    return ResNet(stem, resnet_stages(**settings), out_features=out_features)


@pytest.mark.parametrize(("depth", "blocks"), [(18, [2, 2, 2, 2]), (50, [3, 4, 6, 3])])
def test_shapes_of_the_stages(depth, blocks):
    net = make_resnet(STAGES, depth=depth, stem_channels=16, res2_channels=32)
    assert [len(getattr(net, name)) for name in STAGES] == blocks
    with torch.no_grad():
        maps = net(torch.randn(1, 3, 70, 96))
    assert [tuple(maps[name].shape[1:]) for name in STAGES] == [
        (32, 18, 24),
        (64, 9, 12),
        (128, 5, 6),
        (256, 3, 3),
    ]
    shapes = net.output_shape()
    assert [(shapes[name].channels, shapes[name].stride) for name in STAGES] == [
        (32, 4),
        (64, 8),
        (128, 16),
        (256, 32),
    ]


def test_resnet50_at_the_usual_width_is_detectron2s():
    ours = make_resnet(["res5"], depth=50, stem_channels=64, res2_channels=256)
    stages = ResNet.make_default_stages(50, stride_in_1x1=False, norm="FrozenBN")
    theirs = ResNet(BasicStem(3, 64, norm="FrozenBN"), stages, out_features=["res5"])
    expected = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == expected
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(image)["res5"], theirs(image)["res5"])


@pytest.mark.parametrize("in_1x1", [True, False])
def test_where_the_stride_is(in_1x1):
    stages = resnet_stages(depth=50, stem_channels=8, res2_channels=16, stride_in_1x1=in_1x1)
    first = stages[1][0]
    assert first.conv1.stride == ((2, 2) if in_1x1 else (1, 1))
    assert first.conv2.stride == ((1, 1) if in_1x1 else (2, 2))


def test_unknown_depth():
    with pytest.raises(ConfigError, match="one of .18, 34, 50, 101, 152., got 20"):
        resnet_stages(depth=20, stem_channels=8, res2_channels=8)


@pytest.mark.parametrize(("depth", "norm"), [(18, "GN"), (50, "FrozenBN")])
@pytest.mark.parametrize("freeze_at", [0, 2])
def test_checkpointing_changes_no_bit(depth, norm, freeze_at):
    images = torch.randn(2, 3, 45, 61)
    found = []
    for switch in (False, True):
        torch.manual_seed(0)
        stages = resnet_stages(depth=depth, stem_channels=32, res2_channels=128, norm=norm)
        net = CheckpointedResNet(
            BasicStem(3, 32, norm=norm),
            stages,
            out_features=["res2", "res4"],
            freeze_at=freeze_at,
            activation_checkpointing=switch,
        )
        found.append(outputs_and_gradients(net, images))
    plain, saved = found
    assert plain.keys() == saved.keys() and {"res2", "res4"} <= plain.keys()
    learned = {name for name, value in plain.items() if value is not None}
    frozen = {name.split(".")[0] for name in plain.keys() - learned}
    assert frozen == ({"stem", "res2"} if freeze_at else set())
    assert all(torch.equal(plain[name], saved[name]) for name in learned)


def test_checkpointing_computes_the_blocks_that_learn_again():
    calls = []
    stages = resnet_stages(depth=18, stem_channels=32, res2_channels=32, norm="GN")
    net = CheckpointedResNet(
        BasicStem(3, 32, norm="GN"),
        stages,
        out_features=["res3"],
        freeze_at=2,
        activation_checkpointing=True,
    )
    for name in ("res2", "res3"):
        for block in getattr(net, name):
            block.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    net(torch.randn(1, 3, 32, 32))["res3"].sum().backward()
    assert calls.count("res2") == 2 and calls.count("res3") == 4
    calls.clear()
    with torch.no_grad():
        net(torch.randn(1, 3, 32, 32))
    assert calls.count("res3") == 2


def test_batch_statistics_are_not_counted_twice():
    stages = resnet_stages(depth=18, stem_channels=8, res2_channels=8, norm="BN")
    with pytest.raises(ConfigError, match="norm=FrozenBN or norm=GN"):
        CheckpointedResNet(
            BasicStem(3, 8, norm="BN"),
            stages,
            out_features=["res5"],
            activation_checkpointing=True,
        )


class Maps(Backbone):
    """A backbone without computation, with a divisibility of its own."""

    size_divisibility = 32
    padding_constraints = {"square_size": 96}

    def __init__(self, strides):
        super().__init__()
        self.strides = strides

    def forward(self, images):
        return {
            name: images.new_full((1, 4, 96 // stride, 96 // stride), float(stride))
            for name, stride in self.strides.items()
        }

    def output_shape(self):
        return {name: ShapeSpec(channels=4, stride=s) for name, s in self.strides.items()}


@pytest.mark.parametrize(
    ("strides", "used", "extra", "names"),
    [
        ({"res3": 8, "res4": 16, "res5": 32}, ["res3", "res4", "res5"], 1, "p3 p4 p5 p6"),
        ({"res2": 4, "res3": 8, "res4": 16}, ["res3", "res4"], 2, "p3 p4 p5 p6"),
        ({"a": 4, "b": 8}, ["a", "b"], 0, "p2 p3"),
        ({"last": 16}, ["last"], 0, "p4"),
    ],
)
def test_names_and_shapes_of_the_channel_mapper(strides, used, extra, names):
    mapper = ChannelMapper(
        bottom_up=Maps(strides),
        in_features=used,
        out_channels=8,
        num_extra_levels=extra,
        num_groups=2,
    )
    maps = mapper(torch.zeros(1, 3, 96, 96))
    assert list(maps) == names.split()
    shapes = mapper.output_shape()
    for name, level_map in maps.items():
        stride = 2 ** int(name[1:])
        assert shapes[name].stride == stride and shapes[name].channels == 8
        side = math.ceil(96 / stride)
        assert level_map.shape == (1, 8, side, side)
    assert mapper.size_divisibility == 32
    assert mapper.padding_constraints == {"square_size": 96}


def test_extra_levels_read_the_backbone_and_then_each_other():
    mapper = ChannelMapper(
        bottom_up=Maps({"res4": 16}),
        in_features=["res4"],
        out_channels=8,
        num_extra_levels=2,
        num_groups=2,
    )
    assert [conv.in_channels for conv in mapper.extra_convs] == [4, 8]
    assert all(conv.stride == (2, 2) for conv in mapper.extra_convs)


def test_a_map_that_the_backbone_does_not_return():
    with pytest.raises(ConfigError, match=r"names \['res5'\], but .* only returns \['res4'\]"):
        ChannelMapper(bottom_up=Maps({"res4": 16}), in_features=["res4", "res5"], out_channels=8)
