"""One pass of inference can report detections by soft-NMS and by top-k alone."""

import json

import pytest
import torch
from detectron2.config import instantiate

from co_detr.engine.train import run_evaluation_only
from co_detr.modeling import TopKPostprocessor
from tests.device import DEVICE
from tests.modeling.builders import detect, evaluating, make_batch, shrink
from tests.modeling.test_configs import load


def config(*overrides):
    return shrink(load("co_dino_r50", "model.auxiliary=null", *overrides))


def test_both_kinds_of_detections():
    torch.manual_seed(0)
    model = instantiate(config("model.compare_top_k=true").model).to(DEVICE)
    batch = make_batch()
    with evaluating(model):
        both = model(batch)
    assert [set(pairs) for pairs in both] == [{"instances", "instances_top_k"}] * 2
    model.compare_top_k = False
    for found, expected in zip(both, detect(model, batch), strict=True):
        assert torch.equal(found["instances"].scores, expected.scores)
    model.postprocessor = TopKPostprocessor(300)
    for found, expected in zip(both, detect(model, batch), strict=True):
        assert torch.equal(found["instances_top_k"].pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(found["instances_top_k"].scores, expected.scores)


def test_both_are_evaluated(rectangles, tmp_path):
    cfg = config(*rectangles, "model.compare_top_k=true")
    torch.manual_seed(0)
    metrics = run_evaluation_only(cfg, resume=False)
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {"AP", "AP50", "AP-red", "top_k/AP", "top_k/AP50", "top_k/AP-red"} <= set(written)
    assert metrics["top_k/AP"] == pytest.approx(written["top_k/AP"])
    for directory in (tmp_path / "out", tmp_path / "out" / "top_k"):
        assert (directory / "coco_instances_results.json").is_file()
