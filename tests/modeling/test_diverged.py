"""A diverged model has a loss that is NaN, in every process: none raises an error of its own."""

import pytest
import torch

from tests.modeling.builders import make_batch, tiny_model, train_step

SIZES = ((96, 128), (80, 112))


@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(heads, value):
    model = tiny_model(heads)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    losses = train_step(model, make_batch(SIZES, num_gts=(2, 0)))
    assert not sum(losses.values()).isfinite()


@pytest.mark.parametrize(
    "part", ["rpn.rpn_head.anchor_deltas", "roi_heads.box_predictor.bbox_pred"]
)
def test_boxes_of_faster_rcnn_that_are_not_finite(part):
    model = tiny_model(2)
    with torch.no_grad():
        model.auxiliary.get_submodule(f"heads.roi.{part}").weight.fill_(float("nan"))
    losses = train_step(model, make_batch(SIZES))
    assert not sum(losses.values()).isfinite()
