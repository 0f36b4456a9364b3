"""A head of one's own is one class and one line of a config: nothing else knows it by name."""

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from torch import nn

from co_detr.checkpoint.saving import Checkpointer
from co_detr.modeling.auxiliary import (
    DeltaCode,
    DenseHead,
    DensePredictions,
    MaxIoUAssigner,
    SmoothL1Criterion,
)
from co_detr.structures import ClassRows
from tests.device import DEVICE
from tests.modeling.builders import (
    assert_complete,
    detect,
    is_inside,
    make_batch,
    tiny_config,
    train_step,
)

FEATURES, STRIDES = ("p3", "p4", "p5"), (8, 16, 32)


class LinearHead(DenseHead):
    """The simplest of all dense heads: a linear layer on every cell, one anchor each."""

    class_layers = {"scores": ClassRows()}

    def __init__(self, *, num_classes, embed_dim):
        super().__init__(
            num_classes=num_classes,
            in_features=FEATURES,
            strides=STRIDES,
            anchor_generator=DefaultAnchorGenerator(
                sizes=[[4.0 * stride] for stride in STRIDES],
                aspect_ratios=[1.0],
                strides=list(STRIDES),
                offset=0.5,
            ),
            assigner=MaxIoUAssigner(),
            box_code=DeltaCode(),
            criterion=SmoothL1Criterion(),
        )
        self.scores = nn.Linear(embed_dim, num_classes)
        self.deltas = nn.Linear(embed_dim, 4)

    def predict(self, maps):
        cells = [level_map.flatten(2).transpose(1, 2) for level_map in maps]
        return DensePredictions.of_levels(
            [self.scores(cell) for cell in cells], [self.deltas(cell) for cell in cells]
        )


def make_model(*overrides):
    cfg = tiny_config(2, overrides)
    cfg.model.auxiliary.linear = L(LinearHead)(
        num_classes="${...num_classes}", embed_dim="${...encoder.embed_dim}"
    )
    torch.manual_seed(0)
    return instantiate(cfg.model).to(DEVICE)


def test_it_is_trained_and_gives_positive_queries():
    model = make_model()
    losses = train_step(model, make_batch())
    assert {"linear.loss_cls", "linear.loss_bbox", "linear_queries.loss_giou"} <= losses.keys()
    assert_complete(model, losses)


@pytest.mark.parametrize("detector", ["linear", "merged", "cascade"])
def test_it_detects_alone_and_with_others(detector):
    overrides = ["model.auxiliary.cascade.head=linear"] if detector == "cascade" else []
    model = make_model(f"model.evaluate_with={detector}", *overrides)
    for found in detect(model, make_batch()):
        assert len(found) and is_inside(found)


def test_its_classes_are_carried_over_by_name(tmp_path):
    source, model = make_model("model.num_classes=4"), make_model("model.num_classes=3")
    with torch.no_grad():
        source.auxiliary.heads["linear"].scores.weight.normal_()
    content = {"model": source.state_dict(), "class_names": ["person", "dog", "cat", "car"]}
    torch.save(content, tmp_path / "model.pth")
    loader = Checkpointer(model, mismatch="by_name", class_names=["cat", "person", "zebra"])
    loader.load(str(tmp_path / "model.pth"))
    old, new = (owner.auxiliary.heads["linear"].scores.weight for owner in (source, model))
    assert torch.equal(new[:2], old[[2, 0]])
