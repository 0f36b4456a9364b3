"""Masks in images of any size: from the predictor, in pictures and in the json."""

import json

import numpy as np
import pycocotools.mask as mask_utils
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from co_detr.errors import ConfigError
from co_detr.modeling.postprocess import DetectedMasks
from co_detr.tools.predict.command_line import parse_arguments, run
from co_detr.tools.predict.files import OutputFolder
from co_detr.tools.predict.predictor import Predictor
from co_detr.tools.predict.results import Classes
from tests.device import NAME


def load(run, **arguments):
    return Predictor(run.config, run.checkpoint, device=NAME, **arguments)


def test_boxes_are_those_of_the_model_without_masks(predictor, predictor_of_masks, photos):
    """Its auxiliary part is stripped, its mask head is not."""
    found, plain = predictor_of_masks(photos / "a.png"), predictor(photos / "a.png")
    assert not plain.has("pred_masks") and predictor_of_masks.model.auxiliary is None
    plain = plain[:15]  # it keeps more of them
    assert found.pred_boxes.tensor.equal(plain.pred_boxes.tensor)
    assert found.scores.equal(plain.scores) and found.pred_classes.equal(plain.pred_classes)
    assert isinstance(found.pred_masks, DetectedMasks) and found.image_size == (60, 80)
    assert found.pred_masks.shape == (len(found), 60, 80) and found.pred_masks.tensor.any()
    assert (found.mask_scores <= found.scores).all() and (found.mask_scores > 0).all()


def test_each_image_has_its_masks(predictor_of_masks, masked, photos):
    batched = load(masked, batch_size=2)
    paths = [photos / f"{name}.png" for name in "abc"]
    for path, found in zip(paths, batched(paths), strict=True):
        alone = predictor_of_masks(path)
        assert found.pred_masks.image_size == found.image_size
        differ = (found.pred_masks.tensor != alone.pred_masks.tensor).float().mean()
        assert differ < 1e-3 and found.pred_classes.equal(alone.pred_classes)


def test_thresholds(predictor_of_masks, masked, photos):
    found = predictor_of_masks(photos / "a.png")
    limit = found.scores.median().item()
    chosen = load(masked, score_threshold=limit)(photos / "a.png")
    assert 0 < len(chosen) == len(chosen.pred_masks) < len(found)
    assert chosen.pred_masks.tensor.equal(found.pred_masks[found.scores >= limit].tensor)
    softer = load(masked, mask_threshold=0.3)(photos / "a.png")
    assert softer.pred_masks.tensor.sum() > found.pred_masks.tensor.sum()
    with pytest.raises(ConfigError, match=r"mask threshold 1.0 must be above 0 and below 1"):
        load(masked, mask_threshold=1.0)


def test_mixed_precision(masked, photos):
    predictor = Predictor(masked.config, masked.checkpoint, device="cpu", amp="bfloat16")
    found = predictor(photos / "a.png")
    assert found.mask_scores.dtype == torch.float32
    assert found.pred_masks.tensor.any() and len(found.pred_masks.rles()) == len(found)


@pytest.mark.parametrize("name", ["roi", "cascade"])
def test_masks_of_other_detectors(masked, photos, name):
    found = load(masked, detector=name)(photos / "a.png")
    assert len(found) == len(found.pred_masks) > 0 and found.has("mask_scores")


@pytest.fixture
def predict(photos, tmp_path):
    """Runs predict.py in this process; returns what it wrote for the first image."""

    def call(model, output, *more):
        options = ["--config-file", model.config, "--checkpoint", model.checkpoint, *more]
        options += ["--device", NAME, "--output", str(tmp_path / output), "--score", "0"]
        assert run(parse_arguments([*options, str(photos / "a.png")])) == 0
        content = json.loads((tmp_path / output / "predictions.json").read_text())
        with Image.open(tmp_path / output / "a.jpg") as picture:
            return np.asarray(picture), content["annotations"]

    return call


def test_pictures_and_json(predict, predictor_of_masks, masked, photos, tmp_path):
    picture, entries = predict(masked, "masks")
    found = predictor_of_masks(photos / "a.png")
    assert [entry["mask_score"] for entry in entries] == found.mask_scores.tolist()
    for entry, mask in zip(entries, found.pred_masks, strict=True):
        decoded = mask_utils.decode(entry["segmentation"])
        assert np.array_equal(decoded, mask.numpy()) and entry["area"] == decoded.sum()
    coco = COCO(str(tmp_path / "masks" / "predictions.json"))  # it is an annotation file
    assert np.array_equal(coco.annToMask(coco.anns[1]), found.pred_masks[0].numpy())
    found.remove("pred_masks")
    classes = Classes.numbered(predictor_of_masks.class_names)
    boxes = OutputFolder(tmp_path / "boxes", classes)
    sample = predictor_of_masks.prepare(photos / "a.png")
    assert (np.abs(np.asarray(boxes.draw(sample.rgb, found)).astype(int) - picture) > 60).any()


def test_softer_masks_are_larger(predict, masked):
    areas = [
        sum(entry["area"] for entry in predict(masked, f"at {limit}", "--mask-threshold", limit)[1])
        for limit in ("0.5", "0.01")
    ]
    assert areas[1] > areas[0]
