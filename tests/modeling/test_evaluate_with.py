"""Evaluation with one auxiliary head instead of the decoder."""

import pytest
import torch
from detectron2.config import instantiate

from co_detr.engine.run import run_evaluation_only
from co_detr.errors import ConfigError
from tests.modeling.builders import (
    detect,
    evaluating,
    is_inside,
    make_batch,
    randomise,
    tiny_config,
    tiny_model,
)


def build(*overrides):
    model = tiny_model(2, overrides)
    randomise(model)
    return model


@pytest.mark.parametrize("name", ["roi", "atss"])
def test_a_head_detects_in_output_resolution(name):
    model = build(f"model.evaluate_with={name}")
    batch = make_batch()
    for sample in batch:
        sample.update(height=2 * sample["height"], width=2 * sample["width"])
    images = model.preprocess(batch)
    with evaluating(model):
        expected = model.auxiliary.inference(name, images, model.encode(images))
    for found, own, sample in zip(detect(model, batch), expected, batch, strict=True):
        assert found.image_size == (sample["height"], sample["width"])
        assert is_inside(found) and len(found)
        own = own[own.pred_boxes.nonempty()]  # others are dropped, as those of the decoder are
        torch.testing.assert_close(found.pred_boxes.tensor, 2 * own.pred_boxes.tensor)
        assert torch.equal(found.scores, own.scores)


def test_the_decoder_does_not_run():
    model = build("model.evaluate_with=atss")
    model.decoder.forward = None
    assert len(detect(model, make_batch())) == 2


def test_null_is_the_decoder():
    batch = make_batch()
    plain, switched = build(), build("model.evaluate_with=null")
    for one, other in zip(detect(plain, batch), detect(switched, batch), strict=True):
        assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)
        assert torch.equal(one.scores, other.scores)


def test_what_is_left_after_stripping_detects_with_the_decoder():
    batch = make_batch()
    expected = detect(build(), batch)
    model = build("model.evaluate_with=roi")
    model.strip_auxiliary()
    for one, other in zip(detect(model, batch), expected, strict=True):
        assert torch.equal(one.scores, other.scores)


@pytest.mark.parametrize(
    ("heads", "overrides", "message"),
    [
        (2, ["model.evaluate_with=fcos"], "evaluate_with=fcos names no .* it has roi, atss; null"),
        (0, ["model.evaluate_with=atss"], "evaluate_with=atss names no .* it has none; null"),
        (2, ["model.auxiliary.roi=null", "model.evaluate_with=roi"], "it has atss; null"),
        (2, ["model.evaluate_with=roi", "model.compare_top_k=true"], "compares detections of the"),
    ],
)
def test_heads_that_cannot_be_evaluated(heads, overrides, message):
    with pytest.raises(ConfigError, match=message):
        instantiate(tiny_config(heads, overrides).model)


def test_a_head_that_is_null_is_left_out():
    model = tiny_model(2, ["model.auxiliary.roi=null"])
    assert list(model.auxiliary.heads) == list(model.auxiliary.positive_queries) == ["atss"]
    with pytest.raises(ConfigError, match="needs a head"):
        tiny_model(2, ["model.auxiliary.roi=null", "model.auxiliary.atss=null"])


def test_each_head_gets_coco_metrics(rectangles):
    cfg = tiny_config(2, [*rectangles, "model.evaluate_with=atss"])
    assert {"AP", "AP50", "AP-red"} <= set(run_evaluation_only(cfg, resume=False))
