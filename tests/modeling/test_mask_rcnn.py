"""The mask head of the auxiliary Mask R-CNN learns, and leaves everything else as it is."""

import json

import numpy as np
import pycocotools.mask as mask_utils
import pytest
import torch
from detectron2.structures import BitMasks

from co_detr.engine.train import run_evaluation_only, run_training
from co_detr.modeling.auxiliary.faster_rcnn import SharedBitMasks
from co_detr.modeling.geometry import BatchPadding
from co_detr.tools.predict.results import Classes, ImageResult
from tests.device import DEVICE
from tests.modeling.builders import (
    assert_complete,
    detect,
    evaluating,
    make_batch,
    random_boxes,
    randomize,
    shrink,
    tiny_model,
    train_step,
    with_masks,
)
from tests.modeling.test_baselines import copy_shared
from tests.modeling.test_configs import instantiate, load


@pytest.fixture
def model():
    cfg = shrink(load("co_detr_r50_mask_rcnn", "model.num_classes=5"))
    torch.manual_seed(0)
    model = instantiate(cfg.model).to(DEVICE)
    randomize(model)
    return model


@pytest.mark.parametrize("num_gts", [(3, 2), (0, 2), (0, 0)])
def test_a_step_trains_the_mask_head(model, num_gts):
    losses = train_step(model, with_masks(make_batch(num_gts=num_gts)))
    assert_complete(model, losses)
    assert "roi.loss_mask" in losses
    assert (losses["roi.loss_mask"] > 0) == (num_gts != (0, 0))


def test_all_other_losses_are_those_without_it(model):
    plain, batch = tiny_model(2), make_batch()
    assert copy_shared(plain, model) == len(plain.state_dict())
    expected = train_step(plain, batch)
    losses = train_step(model, with_masks(make_batch()))
    # 6 decoder layers in the paper, 2 here, times lambda_2
    assert losses.pop("roi.loss_mask").item() == pytest.approx(4 * 0.7, rel=0.5)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)


BOXES = {"pred_boxes", "scores", "pred_classes"}


def test_the_head_detects_masks_in_output_resolution(model):
    batch = make_batch()
    batch[0].update(height=192, width=64)
    model.evaluate_with = "roi"
    (found, _) = detect(model, batch)
    assert set(found.get_fields()) == {*BOXES, "pred_masks"}
    assert found.pred_masks.shape == (len(found), 192, 64) and found.pred_masks.tensor.any()
    # A mask lies in its box.
    for mask, box in zip(found.pred_masks, found.pred_boxes.tensor, strict=True):
        rows, columns = mask.nonzero(as_tuple=True)
        if len(rows):
            assert box[0] - 1 <= columns.min() and columns.max() <= box[2] + 1
            assert box[1] - 1 <= rows.min() and rows.max() <= box[3] + 1


def test_masks_are_written(model):
    model.evaluate_with = "roi"
    (found, _) = detect(model, make_batch())
    result = ImageResult.of(1, "a.png", found.to("cpu"), Classes.numbered("abcde"))
    (first, *_) = json.loads(json.dumps(result.annotations))
    assert first["segmentation"]["size"] == [96, 128]


def test_detectors_beside_the_head_have_boxes_only(model):
    model.compare_detectors = True
    with evaluating(model):
        outputs = model(make_batch())
    for found in (instances for output in outputs for instances in output.values()):
        assert set(found.get_fields()) == BOXES and len(found)
    for name in ("merged", "cascade"):
        model.evaluate_with = name
        assert set(detect(model, make_batch())[0].get_fields()) == BOXES


def test_the_decoder_does_without_the_mask_head(model):
    before = detect(model, make_batch())
    model.strip_auxiliary()
    for one, other in zip(detect(model, make_batch()), before, strict=True):
        assert torch.equal(one.scores, other.scores)
        assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)


def test_images_without_masks_train_the_rest(model):
    """The mask head learns from the other images of the batch, or nothing, in finite steps."""
    batch = with_masks(make_batch())
    both = train_step(model, batch)
    del batch[1]["instances"]._fields["gt_masks"]
    one = train_step(model, batch)
    assert_complete(model, one)
    assert 0 < one["roi.loss_mask"] != both["roi.loss_mask"]
    for name in one.keys() - {"roi.loss_mask"}:
        torch.testing.assert_close(one[name], both[name])
    del batch[0]["instances"]._fields["gt_masks"]
    none = train_step(model, batch)
    assert_complete(model, none)
    assert none["roi.loss_mask"] == 0


def test_shared_bitmaps_are_those_of_detectron2():
    masks = BitMasks(torch.rand(3, 20, 30) > 0.5)
    rows = torch.tensor([2, 0, 2, 1, 1])
    boxes = random_boxes(5, (20, 30), torch.Generator().manual_seed(0), smallest=3.0)
    shared = SharedBitMasks(masks.tensor)[rows]
    assert torch.equal(shared.tensor, masks.tensor[rows]) and len(shared) == 5
    assert torch.equal(shared.crop_and_resize(boxes, 14), masks[rows].crop_and_resize(boxes, 14))
    positive = torch.tensor([True, False, True, False, True])
    assert torch.equal(shared[positive].tensor, masks.tensor[rows[positive]])


def test_what_a_box_has_of_the_padding_is_background():
    """An object that fills an image of 20x20, in a network input of 32x32 that is all image."""
    masks = BitMasks(torch.ones(1, 20, 20, dtype=torch.bool))
    shared = SharedBitMasks.of(masks, (32, 32))[torch.tensor([0, 0])]
    assert shared.image_size == (32, 32)
    boxes = torch.tensor([[4.0, 16.0, 12.0, 24.0], [16.0, 4.0, 24.0, 12.0]])
    below, beside = shared.crop_and_resize(boxes, 32)  # cells of a quarter of a pixel
    assert below[:16].all() and not below[16:].any()
    assert beside[:, :16].all() and not beside[:, 16:].any()
    assert SharedBitMasks.of(masks, (20, 20)).bitmaps is masks.tensor


def test_padding_that_counts_as_image_is_background_of_masks(model):
    """The same losses as with masks that are padded beforehand."""
    model.padding = BatchPadding(square_size=160, masked=False)
    batch, losses = make_batch(sizes=[(96, 128)] * 2), []
    for sample in batch:  # all objects reach the end of their image
        boxes = sample["instances"].gt_boxes.tensor
        boxes[:, 2], boxes[:, 3] = 128, 96
    for size in ((96, 128), (160, 160)):
        for sample in batch:
            boxes = sample["instances"].gt_boxes.tensor.round().int().tolist()
            masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
            for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
                mask[y0:y1, x0:x1] = True
            sample["instances"]._fields["gt_masks"] = BitMasks(masks)
        losses.append(train_step(model, batch)["roi.loss_mask"])
    assert torch.equal(*losses)


def test_boxes_of_detections_with_masks_are_evaluated(rectangles, tmp_path):
    cfg = shrink(load("co_detr_r50_mask_rcnn", *rectangles, "model.evaluate_with=roi"))
    assert "AP" in run_evaluation_only(cfg, resume=False)
    found = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert found and all(detection["segmentation"]["size"] == [128, 128] for detection in found)


def _mix_masks(path):
    """Polygons, run lengths of both forms, crowds, a broken mask and none, in one file."""
    content = json.loads(path.read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    for index, entry in enumerate(content["annotations"]):
        x, y, w, h = entry["bbox"]
        height, width = sizes[entry["image_id"]]
        polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        (packed,) = mask_utils.frPyObjects(polygon, height, width)
        flat = mask_utils.decode(packed).T.reshape(-1)
        ends = np.flatnonzero(np.diff(np.concatenate([[0], flat, [2]])))
        plain = np.diff(np.concatenate([[0], ends])).tolist()
        size = [height, width]
        entry["segmentation"] = [
            polygon,
            {"size": size, "counts": packed["counts"].decode()},
            {"size": size, "counts": plain},
        ][index % 3]
        entry["iscrowd"] = int(index % 7 == 4)
    content["annotations"][0]["segmentation"] = [[1, 2, 3, 4]]
    del content["annotations"][3]["segmentation"]
    path.write_text(json.dumps(content))


def test_masks_of_all_kinds_in_one_file_are_trained_and_evaluated(rectangles, tmp_path, caplog):
    _mix_masks(tmp_path / "rectangles.json")
    recipe = ["train.max_iter=2", "train.log_period=1", "train.eval_period=2"]
    cfg = shrink(load("co_detr_r50_mask_rcnn", *rectangles, *recipe, "model.evaluate_with=roi"))
    run_training(cfg, resume=False)
    assert "2 objects in" in caplog.text and "have no mask" in caplog.text
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line).get("roi.loss_mask") for line in lines]
    assert any(losses) and all(loss is None or loss > 0 for loss in losses)
    assert "AP" in json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "Only boxes are evaluated" in caplog.text  # as objects of the val set have no masks
