"""Masks of detections are pasted as Detectron2 does it, one at a time.

That the reference does so, too, is in tests/parity.
"""

import numpy as np
import pycocotools.mask as mask_utils
import pytest
import torch
from detectron2.layers import paste_masks_in_image
from detectron2.structures import Boxes, Instances, ROIMasks

from co_detr.modeling import postprocess
from co_detr.modeling.postprocess import DetectedMasks, in_output_resolution
from tests.device import DEVICE

SIZE = (40, 60)
# Inside, over the edges, less than a pixel, the whole image, and outside of it.
BOXES = torch.tensor(
    [
        [5.3, 6.1, 40.2, 33.7],
        [-6.0, -3.0, 25.0, 20.0],
        [30.5, 20.5, 31.2, 20.9],
        [0.0, 0.0, 60.0, 40.0],
        [45.0, 10.0, 75.0, 55.0],
        [70.0, 50.0, 80.0, 60.0],
    ]
)


def made_up(boxes=BOXES, side=28, size=SIZE):
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(len(boxes), 1, side, side, generator=generator)
    smooth = torch.nn.functional.avg_pool2d(noise, 5, stride=1, padding=2)[:, 0]
    return DetectedMasks(smooth * 1.1, boxes, size)


@pytest.fixture
def masks():
    return made_up()


def test_pasted_as_by_detectron2(masks):
    expected = paste_masks_in_image(masks.probabilities[:5], masks.boxes[:5], SIZE)
    assert masks[:5].tensor.equal(expected) and 0 < expected[3].sum() < expected[3].numel()
    assert not masks[5].any()  # the box outside, which Detectron2 cannot paste


def test_large_masks_are_pasted_in_strips(masks, monkeypatch):
    expected = masks.tensor
    monkeypatch.setattr(postprocess, "_PASTED_AT_A_TIME", 100)
    assert masks.tensor.equal(expected)


@pytest.mark.parametrize("box", [[20.0, 10.0, 20.0, 30.0], [20.0, 10.0, 30.0, 10.0]])
def test_a_box_without_area(box):
    """The two columns, or rows, around it are those of the middle of the mask."""
    masks = DetectedMasks(torch.ones(1, 28, 28), torch.tensor([box]), SIZE)
    rows, columns = np.nonzero(masks[0].numpy())
    extent = {int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1}
    assert 2 in extent and len(extent) == 2


def test_run_lengths_are_those_of_pycocotools(masks):
    whole = DetectedMasks(torch.ones(3, 4, 4), BOXES[[3, 4, 5]], SIZE)
    columns = DetectedMasks(torch.ones(1, 4, 4), torch.tensor([[10.0, -9.0, 30.0, 90.0]]), SIZE)
    for form in (masks, whole, columns):
        bitmaps = form.tensor.numpy().astype(np.uint8)
        for rle, bitmap in zip(form.rles(), bitmaps, strict=True):
            expected = mask_utils.encode(np.asfortranarray(bitmap))
            assert rle == {"size": list(SIZE), "counts": expected["counts"].decode()}


def test_it_is_used_as_a_tensor(masks):
    bitmaps = masks.tensor
    assert masks.shape == bitmaps.shape and len(masks) == 6
    assert np.array_equal(np.asarray(masks), bitmaps.numpy())
    assert all(one.equal(other) for one, other in zip(masks, bitmaps, strict=True))
    assert masks[3].equal(bitmaps[3]) and masks[-2].equal(bitmaps[-2])
    for item in (slice(1, 4), torch.tensor([3, 0]), torch.arange(6) < 2, []):
        assert masks[item].tensor.equal(bitmaps[item])
    assert DetectedMasks.cat([masks[:2], masks[2:]]).tensor.equal(bitmaps)
    moved = masks.to(DEVICE)
    assert moved.boxes.device == moved.probabilities.device == torch.device(DEVICE)
    assert moved.tensor.equal(bitmaps)
    with pytest.raises(IndexError):
        masks[6]


def test_another_threshold(masks):
    softer = DetectedMasks(masks.probabilities, masks.boxes, SIZE, threshold=0.3)
    assert softer.tensor.sum() > masks.tensor.sum() and (softer.tensor | ~masks.tensor).all()
    assert softer[:1].threshold == softer.to("cpu").threshold == 0.3


def found_in_input(masks):
    return Instances(
        (80, 120),
        pred_boxes=Boxes(BOXES * 2),
        scores=torch.linspace(0.9, 0.1, 6),
        pred_classes=torch.arange(6),
        pred_masks=masks,
        mask_scores=torch.linspace(0.8, 0.0, 6),
    )


@pytest.mark.parametrize("of_detectron2", [False, True])
def test_detections_in_output_resolution(masks, of_detectron2):
    """Masks go with their boxes; those of boxes outside the image go away with them."""
    predicted = masks.probabilities
    predicted = predicted[:, None] if of_detectron2 else ROIMasks(predicted)
    given = found_in_input(predicted)
    sample = {"image": torch.zeros(3, 80, 120), "height": SIZE[0], "width": SIZE[1]}
    found = in_output_resolution(given, sample)
    assert found.pred_classes.tolist() == [0, 1, 2, 3, 4]
    assert found.pred_masks.image_size == found.image_size == SIZE
    boxes = Boxes(BOXES[:5].clone())
    boxes.clip(SIZE)
    assert found.pred_boxes.tensor.equal(boxes.tensor)
    expected = DetectedMasks(masks.probabilities[:5], boxes.tensor, SIZE)
    assert found.pred_masks.tensor.equal(expected.tensor)
    assert found.mask_scores.equal(given.mask_scores[:5])
    assert set(given.get_fields()) == set(found.get_fields())
    found.pred_boxes.scale(2, 2)
    assert found.pred_masks.tensor.equal(expected.tensor)  # boxes are its own
    chosen = found[found.scores > 0.5]
    assert len(chosen) == len(chosen.pred_masks) == 3


def test_detectron2_draws_them(masks):
    pytest.importorskip("cv2")
    from detectron2.utils.visualizer import Visualizer

    sample = {"image": torch.zeros(3, 40, 60)}
    predicted = ROIMasks(masks.probabilities)
    given = Instances(SIZE, pred_boxes=Boxes(BOXES.clone()), pred_masks=predicted)
    found = in_output_resolution(given, sample)
    blank = np.zeros((*SIZE, 3), np.uint8)
    drawn = Visualizer(blank).draw_instance_predictions(found[:2]).get_image()
    assert drawn.shape == blank.shape and drawn.any()
