"""The predictor looks more than once: test-time augmentation, tiles, and other packages' slices."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from co_detr.engine.views import TTA, Tiles
from co_detr.errors import ConfigError
from co_detr.tools.predict.command_line import parse_arguments, run
from co_detr.tools.predict.predictor import Predictor
from tests.device import NAME
from tests.prediction.test_predictor import same


def load(trained, **arguments):
    return Predictor(trained.config, trained.checkpoint, device=NAME, **arguments)


@pytest.mark.parametrize("view", [{"tta": TTA(mirror=False)}, {"tiles": 80}, {"tiles": 1000}])
def test_one_plain_view_gives_the_same_to_the_last_bit(trained, predictor, photos, view):
    paths = [photos / f"{name}.png" for name in "abc"]
    for found, plain in zip(load(trained, **view)(paths), predictor(paths), strict=True):
        assert same(found, plain)


def test_a_mirrored_view_of_a_mirrored_image_is_the_image(trained, predictor, photos):
    class Mirrored(TTA):
        """Only the mirrored view."""

        def views(self, image_size):
            return super().views(image_size)[1:]

    pixels = np.asarray(Image.open(photos / "a.png"))
    plain = predictor(pixels)
    found = load(trained, tta=Mirrored())(pixels[:, ::-1])
    assert found.scores.equal(plain.scores) and found.pred_classes.equal(plain.pred_classes)
    boxes = found.pred_boxes.tensor
    mirrored = torch.stack([80 - boxes[:, 2], boxes[:, 1], 80 - boxes[:, 0], boxes[:, 3]], dim=1)
    torch.testing.assert_close(mirrored, plain.pred_boxes.tensor, rtol=0, atol=1e-4)


def test_what_two_views_find_is_one_list(trained, predictor, photos):
    plain = predictor(photos / "a.png")
    found = load(trained, tta="flip", batch_size=2)(photos / "a.png")
    assert found.image_size == plain.image_size and 0 < len(found) <= len(plain)
    assert (found.scores[:-1] >= found.scores[1:]).all()
    assert not same(found, plain)


def test_views_with_masks(masked, predictor_of_masks, photos):
    plain = predictor_of_masks(photos / "a.png")
    for view in ({"tta": "flip"}, {"tiles": 60}):
        found = load(masked, mask_threshold=0.4, **view)(photos / "a.png")
        assert found.pred_masks.shape == (len(found), 60, 80) and len(found)
        assert found.pred_masks.threshold == 0.4
        assert (found.mask_scores <= found.scores).all() and (found.mask_scores > 0).all()
    same_masks = load(masked, tta=TTA(mirror=False))(photos / "a.png").pred_masks
    assert same_masks.tensor.equal(plain.pred_masks.tensor)


def test_tiles_run_in_batches_of_equal_size(trained, photos):
    tiled = load(trained, tiles=Tiles(40, overlap=0.5), batch_size=3)
    sizes = []
    tiled.model.register_forward_pre_hook(
        lambda _, inputs: sizes.append([tuple(entry["image"].shape) for entry in inputs[0]])
    )
    found = tiled(photos / "a.png")
    assert [len(batch) for batch in sizes] == [3, 3, 1]  # six tiles, and the full image
    assert all(len(set(batch)) == 1 for batch in sizes)
    assert found.image_size == (60, 80) and found.pred_boxes.tensor[:, 2].max() > 40


def test_command_line(trained, photos, tmp_path):
    def predict(name, *options):
        common = ["--config-file", trained.config, "--checkpoint", trained.checkpoint]
        common += [str(photos / "a.png"), "--output", str(tmp_path / name), "--score", "0"]
        assert run(parse_arguments([*common, "--device", NAME, *options])) == 0
        return json.loads((tmp_path / name / "predictions.json").read_text())["annotations"]

    plain = predict("plain")
    assert predict("one_tile", "--tiles", "100") == plain
    assert predict("flip", "--tta", "flip") != plain
    assert predict("tiles", "--tiles", "40", "--overlap", "0.5") != plain
    with pytest.raises(ConfigError, match="--overlap is of tiles"):
        predict("wrong", "--overlap", "0.5")
    with pytest.raises(ConfigError, match="tta and tiles do not go together"):
        predict("wrong", "--tiles", "40", "--tta", "flip")


def test_supervision(predictor, predictor_of_masks, photos):
    supervision = pytest.importorskip("supervision")
    found = predictor(photos / "a.png")
    detections = predictor.to_supervision(found)
    assert np.array_equal(detections.xyxy, found.pred_boxes.tensor.numpy())
    assert np.array_equal(detections.confidence, found.scores.numpy())
    assert np.array_equal(detections.class_id, found.pred_classes.numpy())
    assert list(detections["class_name"]) == predictor.names(found)
    assert detections.mask is None

    masked = predictor_of_masks(photos / "a.png")
    with_masks = predictor_of_masks.to_supervision(masked)
    assert np.array_equal(with_masks.mask, masked.pred_masks.tensor.numpy())
    assert len(predictor.to_supervision(found[:0])) == 0

    slicer = supervision.InferenceSlicer(
        callback=lambda part: predictor.to_supervision(predictor(part)),
        slice_wh=(50, 50),
        overlap_wh=(10, 10),
    )
    sliced = slicer(np.asarray(Image.open(photos / "a.png")))
    assert len(sliced) and sliced.xyxy[:, 2].max() > 50
    assert set(sliced["class_name"]) <= set(predictor.class_names)


def test_what_is_not_installed_is_named(predictor, photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ConfigError, match="pip install supervision"):
        predictor.to_supervision(predictor(photos / "a.png"))
