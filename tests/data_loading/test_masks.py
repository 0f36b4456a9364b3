"""Masks of all kinds are read, or named and left out, and follow every augmentation."""

from functools import partial

import detectron2.data.transforms as T
import numpy as np
import pycocotools.mask as mask_utils
import pytest
import torch
from detectron2.structures import BitMasks, Instances

from co_detr.data.augmentation import detr_train_augmentation, lsj_train_augmentation
from co_detr.data.coco import load_coco
from co_detr.data.loader import CheckedDatasetMapper
from co_detr.data.masks import (
    CroppedMasks,
    draw_mask,
    picked_pixels,
    transformed_masks,
)
from co_detr.data.preflight import PreflightSettings, SplitFiles, preflight
from co_detr.data.segmentation import check_mask, encoded_mask
from co_detr.errors import DataError
from co_detr.seeding import locally_seeded
from tests.data_loading.preflight_data import HEIGHT, WIDTH

SIZE = (HEIGHT, WIDTH)
NAN = float("nan")


def square(x, y, side=10):
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def bitmap(seed=0, size=SIZE):
    """An object of several parts."""
    draws = np.random.default_rng(seed).random((size[0] // 4, size[1] // 4)) > 0.6
    return np.kron(draws, np.ones((4, 4))).astype(np.uint8)


def packed(mask):
    """COCO's compressed form, with text as json has it."""
    found = mask_utils.encode(np.asfortranarray(mask))
    return {"size": list(found["size"]), "counts": found["counts"].decode()}


def unpacked(mask):
    """COCO's plain form."""
    flat = np.concatenate([[0], mask.T.reshape(-1), [2]])
    ends = np.flatnonzero(np.diff(flat))  # where a run ends
    counts = np.diff(np.concatenate([[0], ends])).tolist()
    return {"size": list(mask.shape), "counts": counts}


@pytest.mark.parametrize("seed", range(5))
def test_run_lengths_of_all_forms_are_one_mask(seed):
    mask = bitmap(seed) if seed else np.eye(*SIZE, dtype=np.uint8)
    text = packed(mask)
    raw = text | {"counts": text["counts"].encode()}
    for form in (text, raw, unpacked(mask)):
        usable = check_mask(form, *SIZE).usable
        assert (draw_mask(usable, *SIZE) == mask).all()
        assert usable == text
    long = np.zeros((900, 1000), np.uint8)  # runs of numbers with many digits
    long[100:101, 990] = long[700:, 5] = 1
    assert check_mask(packed(long), 900, 1000).usable == packed(long)


def test_polygons_are_drawn_as_pycocotools_draws_them():
    polygons = [square(3.4, 2.2), [30.5, 20, 44.2, 22.9, 33.3, 39.7]]
    expected = mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(polygons, *SIZE)))
    assert (draw_mask(check_mask(polygons, *SIZE).usable, *SIZE) == expected).all()


TEXT = packed(bitmap())
SUM = HEIGHT * WIDTH
# What is there, what the sentence calls it, and whether it stops the run in any case.
BROKEN = {
    "few points": ([[1, 2, 3, 4]], "polygons of fewer than three points", False),
    "odd": ([[*square(3, 4), 5]], "polygons with an odd number of coordinates", False),
    "nan": ([[NAN, *square(3, 4)[1:]]], "NaN, infinite or null", False),
    "infinite": ([[float("inf"), *square(3, 4)[1:]]], "NaN, infinite or null", False),
    "null": ([[None, *square(3, 4)[1:]]], "NaN, infinite or null", False),
    "outside": ([square(WIDTH + 5, 2)], "masks outside of their image", False),
    "far out": ([[0, 0, 1e9, 0, 1e9, 9]], "masks outside of their image", False),
    "line": ([[1, 1, 5, 5, 9, 9]], "masks without area", False),
    "no pixel": ({"size": list(SIZE), "counts": [SUM]}, "masks without area", False),
    "sum": ({"size": list(SIZE), "counts": [5, SUM]}, "do not sum to height times width", False),
    "empty counts": ({"size": list(SIZE), "counts": []}, "do not sum", False),
    "short": (TEXT | {"counts": TEXT["counts"][:-4]}, "run-length masks whose counts", False),
    "cut": (TEXT | {"counts": "XX"}, "counts are damaged", False),
    "letters": (TEXT | {"counts": "ä~!"}, "counts are damaged", False),
    "endless": (TEXT | {"counts": "o" * 40 + "0"}, "counts are damaged", False),
    "negative": ({"size": list(SIZE), "counts": [-5, SUM + 5]}, "counts are damaged", False),
    "nan counts": ({"size": list(SIZE), "counts": [NAN, 5]}, "counts are damaged", False),
    "exchanged": (TEXT | {"size": [WIDTH, HEIGHT]}, "of another size than their image", True),
    "other size": (TEXT | {"size": None}, "neither polygons nor run lengths", True),
    "text": ("polygon", "neither polygons nor run lengths", True),
    "text inside": ([[*square(3, 4)[:-1], "9"]], "neither polygons nor run lengths", True),
    "number": (7, "neither polygons nor run lengths", True),
    "no counts": ({"size": list(SIZE)}, "neither polygons nor run lengths", True),
    "ragged": ([[[1, 2], [3]]], "neither polygons nor run lengths", True),
}


def give_masks(data):
    for content in (data.train, data.val):
        for annotation in content["annotations"]:
            x, y, w, h = annotation["bbox"]
            annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]


def report_of(data, invalid_boxes="skip", **settings):
    splits = [
        SplitFiles(split, str(data.root / f"{split}.json"), str(data.root / split), masks=True)
        for split in ("train", "val")
    ]
    settings = {"images": "off", **settings}
    return preflight(splits, PreflightSettings(**settings), invalid_boxes)


def records_of(data, invalid_boxes="skip"):
    root = data.root
    return load_coco(
        str(root / "train.json"), str(root / "train"), invalid_boxes=invalid_boxes, with_masks=True
    )


def sentence_of(call):
    with pytest.raises(DataError) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".") and len(sentence) < 600
    return sentence


@pytest.mark.parametrize("name", BROKEN)
def test_each_broken_mask_is_named_and_counted_or_refused(data, caplog, name):
    segmentation, what, stops = BROKEN[name]
    give_masks(data)
    broken = data.train["annotations"][1]
    broken["segmentation"] = segmentation
    data.write()
    for invalid_boxes in ("skip", "error"):
        report = report_of(data, invalid_boxes)
        (finding,) = [finding for finding in report.findings if what in finding.what]
        assert finding.count == 1 and finding.first.startswith(f"id {broken['id']}")
        if stops or invalid_boxes == "error":
            assert what in sentence_of(report.raise_on_errors)
            assert what in sentence_of(partial(records_of, data, invalid_boxes))
            continue
        report.raise_on_errors()
        assert report.splits[0].masks == 11
        annotations = records_of(data)[0]["annotations"]
        assert ["segmentation" in annotation for annotation in annotations] == [True, False, True]
        assert f"{what}" in caplog.text and f"annotation {broken['id']} of image" in caplog.text
        assert "1 objects in 1 images have no mask" in caplog.text
    encoded = encoded_mask(segmentation, *SIZE)  # of an evaluation
    if name in ("outside", "far out", "line", "no pixel"):
        assert encoded["size"] == list(SIZE) and mask_utils.area(encoded) == 0
    else:
        assert encoded is None


@pytest.mark.parametrize(
    ("segmentation", "what"),
    [
        (square(3, 4), "polygons that are no list in a list"),
        ([np.reshape(square(3, 4), (4, 2)).tolist()], "polygons that are lists of points"),
    ],
)
def test_what_has_one_meaning_is_read(data, segmentation, what):
    give_masks(data)
    data.train["annotations"][0].update(segmentation=segmentation, bbox=[3, 4, 10, 10])
    data.write()
    for invalid_boxes in ("skip", "error"):
        assert [
            (finding.level, finding.what) for finding in report_of(data, invalid_boxes).findings
        ] == [("warning", what)]
        (mask,) = records_of(data, invalid_boxes)[0]["annotations"][0]["segmentation"]
        assert mask.tolist() == square(3, 4)


@pytest.mark.parametrize("absent", [None, []])
def test_a_set_without_masks(data, caplog, absent):
    for entry in data.train["annotations"]:
        entry["segmentation"] = absent
    data.write()
    train, val = report_of(data).findings
    assert (train.count, train.what) == (12, "objects without a mask")
    assert "what learns masks is not trained, and nothing is pasted" in train.remedy
    assert val.count == 9 and "masks are only evaluated where" in val.remedy
    assert not any(
        "segmentation" in annotation for r in records_of(data) for annotation in r["annotations"]
    )
    assert caplog.text.count("has no masks") == 1


def test_masks_and_boxes_that_disagree(data):
    give_masks(data)
    data.train["annotations"][0]["segmentation"] = [square(30, 28)]
    data.write()
    (finding,) = report_of(data).findings
    assert (finding.level, finding.count) == ("warning", 1)
    assert finding.what == "masks that do not fit the boxes of their objects"
    assert "mask in (30, 28, 40, 38)" in finding.first
    for annotation in data.train["annotations"]:
        (polygon,) = annotation["segmentation"]
        annotation["segmentation"] = [np.reshape(polygon, (-1, 2))[:, ::-1].reshape(-1).tolist()]
    data.write()
    sentence = sentence_of(report_of(data).raise_on_errors)
    assert "are x and y exchanged" in sentence and "data.preflight.suspicion=warning" in sentence
    report_of(data, suspicion="warning").raise_on_errors()


def test_normalized_masks_stop_the_run(data):
    give_masks(data)
    for annotation in data.train["annotations"]:
        (polygon,) = annotation["segmentation"]
        annotation["segmentation"] = [
            (np.reshape(polygon, (-1, 2)) / SIZE[::-1]).reshape(-1).tolist()
        ]
    data.write()
    sentence = sentence_of(report_of(data).raise_on_errors)
    assert "masks that are normalized (from 0 to 1) instead of in pixels: 12 " in sentence


def test_crowds_keep_no_mask_and_polygons_of_crowds_are_told(data):
    give_masks(data)
    for annotation, mask in zip(data.train["annotations"], ([square(2, 1)], TEXT), strict=False):
        annotation.update(iscrowd=1, segmentation=mask)
    data.write()
    report = report_of(data)
    (finding,) = [finding for finding in report.findings if "polygon" in finding.what]
    assert finding.count == 1 and "taken as crowds" in finding.remedy
    assert report.splits[0].masks == 10
    kept = records_of(data)[0]["annotations"]
    assert ["segmentation" in record for record in kept] == [False, False, True]


# Augmentation.

MASKS = [check_mask(form, *SIZE).usable for form in ([square(3, 4, 30)], TEXT, [square(40, 2)])]


def whole(mask, transforms):
    """Every pixel of an augmented bitmap, without regard to where the object is."""
    picked = picked_pixels(transforms, SIZE)
    rows, columns = picked.rows, picked.columns
    return draw_mask(mask, *SIZE)[rows][:, columns]


@pytest.mark.parametrize("augmentation", ["detr", "lsj"])
def test_masks_follow_augmentations(augmentation):
    """Also where an object is cut off, small, mirrored or out of sight."""
    steps = {
        "detr": detr_train_augmentation(
            (30, 60), crop_probability=0.7, crop_short_edges=(40, 70), crop_size=(20, 50)
        ),
        "lsj": lsj_train_augmentation(64),
    }[augmentation]
    image = np.zeros((*SIZE, 3), np.uint8)
    image[4:34, 3:33] = 255  # the first mask
    shown = 0
    for seed in range(20):
        augmented = T.AugInput(image)
        with locally_seeded("masks", seed):
            transforms = T.AugmentationList(steps)(augmented)
        masks = transformed_masks(MASKS, SIZE, transforms)
        found = masks.whole().tensor.numpy()
        assert torch.equal(masks.boxes().tensor, masks.whole().get_bounding_boxes().tensor)
        assert (found == [whole(mask, transforms) for mask in MASKS]).all()
        white = torch.from_numpy(augmented.image[None, :, :, 0] > 127)
        if white.any() and found[0].any():
            shown += 1
            seen = BitMasks(white).get_bounding_boxes().tensor
            assert (masks.boxes().tensor[:1] - seen).abs().max() <= 2  # a pixel, enlarged
    assert shown > 10


def test_a_pixel_is_the_nearest_one_of_the_reference():
    resize = T.TransformList([T.ResizeTransform(*SIZE, 37, 61)])
    picked = picked_pixels(resize, SIZE)
    rows, columns = picked.rows, picked.columns
    assert rows.tolist() == [row * HEIGHT // 37 for row in range(37)]
    assert columns.tolist() == [column * WIDTH // 61 for column in range(61)]


def test_other_transforms_are_applied_to_whole_masks():
    class Turned(T.Transform):
        def apply_image(self, image):
            return np.rot90(image)

        def apply_segmentation(self, mask):
            return np.rot90(mask)

        def apply_coords(self, coords):
            raise NotImplementedError

    found = transformed_masks(MASKS, SIZE, T.TransformList([Turned()])).whole()
    assert found.image_size == (WIDTH, HEIGHT)
    assert all(
        (one.numpy() == np.rot90(draw_mask(mask, *SIZE))).all()
        for one, mask in zip(found, MASKS, strict=True)
    )


def test_of_many_masks_a_sample_is_looked_at(data, monkeypatch):
    give_masks(data)
    data.write()
    monkeypatch.setattr("co_detr.data.preflight.MOST_MASKS", 5)
    report, number = report_of(data), len(data.train["annotations"])
    assert [split.masks for split in report.splits] == [5, 5] and number > 5
    assert f"train: masks of 5 objects of {number} were looked at" in report.text()
    every = report_of(data, images="all")
    assert every.splits[0].masks == number and "were looked at" not in every.text()


def test_cropped_masks_are_indexed_as_fields_of_instances():
    bitmaps = np.stack([bitmap(seed) != 0 for seed in range(3)])
    bitmaps[1] = False
    masks = CroppedMasks.of_bitmaps(bitmaps, SIZE)
    whole = BitMasks(torch.from_numpy(bitmaps))
    assert torch.equal(masks.boxes().tensor, whole.get_bounding_boxes().tensor)
    for item in (torch.tensor([True, False, True]), torch.tensor([2, 0, 2]), slice(1, 3)):
        assert torch.equal(masks[item].whole().tensor, whole[item].tensor)
    found = Instances(SIZE, gt_masks=masks)[torch.tensor([False, False, False])]
    assert len(found) == 0 and found.gt_masks.whole().tensor.shape == (0, *SIZE)


def mapped(data, transform, **settings):
    data.write()
    mapper = CheckedDatasetMapper(True, [transform], "RGB", **settings)
    return mapper(records_of(data)[0])["instances"]


def test_a_crop_leaves_objects_that_show_and_boxes_as_the_recipe_says(data):
    give_masks(data)
    first, second, _ = data.train["annotations"][:3]
    first.update(bbox=[5, 5, 20, 20], segmentation=[[5, 5, 25, 5, 5, 25]])
    second.update(bbox=[5, 5, 20, 20], segmentation=[square(15, 15)])  # not in the crop
    crop = T.CropTransform(0, 0, 12, 12)
    found = mapped(data, crop)
    assert len(found) == len(found.gt_masks) == 1 and found.gt_masks.image_size == (12, 12)
    assert found.gt_boxes.tensor.tolist() == [[5, 5, 12, 12]]
    first["segmentation"] = [[5, 5, 25, 5, 25, 8, 5, 8]]
    assert mapped(data, crop).gt_boxes.tensor.tolist() == [[5, 5, 12, 12]]
    assert mapped(data, crop, recompute_boxes=True).gt_boxes.tensor.tolist() == [[5, 5, 12, 8]]


def test_an_object_without_a_mask_leaves_its_image_without(data):
    give_masks(data)
    assert mapped(data, T.NoOpTransform()).has("gt_masks")
    data.train["annotations"][1]["segmentation"] = []
    found = mapped(data, T.NoOpTransform(), recompute_boxes=True)
    assert len(found) == 3 and not found.has("gt_masks")
