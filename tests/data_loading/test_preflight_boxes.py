"""What the preflight sees over a whole file: notations and units of boxes, crowds, crowded images,
sizes of objects."""

import numpy as np
import pytest

from co_detr.data.preflight import PreflightSettings, preflight
from co_detr.data.preflight_boxes import InputSize, Limit, Limits
from tests.data_loading.preflight_data import HEIGHT, WIDTH


def _rewrite(data, function, split="train"):
    """Gives every box another notation."""
    sizes = {
        image["id"]: (image["width"], image["height"]) for image in getattr(data, split)["images"]
    }
    for annotation in getattr(data, split)["annotations"]:
        annotation["bbox"] = function(*annotation["bbox"], *sizes[annotation["image_id"]])
    data.write()


@pytest.mark.parametrize(
    ("function", "kind", "remedy"),
    [
        (lambda x, y, w, h, *_: [x, y, x + w, y + h], "corners (x0, y0, x1, y1)", "subtract x0"),
        (
            lambda x, y, w, h, *_: [x + w / 2, y + h / 2, w, h],
            "centers (cx, cy, w, h)",
            "subtract half of w",
        ),
        (
            lambda x, y, w, h, W, H: [x / W, y / H, w / W, h / H],
            "normalized (from 0 to 1) instead of in pixels:",
            "multiply x and w by the width",
        ),
        (
            lambda x, y, w, h, W, H: [x / W, y / H, (x + w) / W, (y + h) / H],
            "normalized (from 0 to 1) instead of in pixels, and corners (x0, y0, x1, y1)",
            "subtract x0 from x1 and y0 from y1, and multiply",
        ),
        (
            lambda x, y, w, h, W, H: [(x + w / 2) / W, (y + h / 2) / H, w / W, h / H],
            "normalized (from 0 to 1) instead of in pixels, and centers (cx, cy, w, h)",
            "subtract half of w from cx and half of h from cy, and multiply",
        ),
        (lambda x, y, w, h, *_: [3 * x, 3 * y, 3 * w, 3 * h], "of all)", "another size"),
    ],
)
def test_boxes_in_another_notation_stop_the_run(data, function, kind, remedy):
    rng = np.random.default_rng(3)
    for annotation in data.train["annotations"]:
        w, h = rng.integers(8, 20, 2)
        x, y = rng.integers(0, WIDTH - w), rng.integers(0, HEIGHT - h)
        annotation["bbox"] = [int(value) for value in (x, y, w, h)]
    data.write()
    data.warnings()  # as (x, y, w, h) they are right
    _rewrite(data, function)
    sentence = data.error()
    assert f"{kind}" in sentence and remedy in sentence and "train.json" in sentence
    assert "more kind" not in sentence  # what follows from it is not told as well
    assert kind in data.error(invalid_boxes="error")


def test_who_knows_better_can_go_on(data):
    """The judgment is a likely one: large labels at the right edge look like corners."""
    rng = np.random.default_rng(3)
    for annotation in data.train["annotations"]:
        w, h = rng.integers(8, 20, 2)
        x, y = rng.integers(0, WIDTH - w), rng.integers(0, HEIGHT - h)
        annotation["bbox"] = [int(value) for value in (x, y, x + w, y + h)]
    data.write()
    assert "if they are right, set data.preflight.suspicion=warning" in data.error()
    kinds = [kind for _, kind in data.warnings(suspicion="warning")]
    assert any("fit as corners (x0, y0, x1, y1)" in kind for kind in kinds)
    assert "boxes that are partly outside their image" in kinds  # they are looked at one by one


def test_some_boxes_outside_say_nothing_about_the_file(data):
    for annotation in data.train["annotations"][:2]:
        annotation["bbox"] = [30, 25, 40, 35]
    data.train["annotations"][5]["bbox"] = [0.0, 0.0, 1.0, 1.0]  # stands for nothing in some sets
    data.write()
    assert data.warnings() == [
        (1, "boxes smaller than a pixel, with numbers from 0 to 1 only"),
        (2, "boxes that are partly outside their image"),
    ]


def test_boxes_in_percent_are_suspected(data):
    for content in (data.train, data.val):
        for image in content["images"]:
            image.update(width=1000, height=600)
    data.write()
    report = data.report(images="off")
    assert "none of 12 reaches beyond 3% of the width, 6% of the height" in report.text()


def test_objects_that_fill_their_images_are_no_corners(data):
    for annotation in data.train["annotations"]:
        annotation["bbox"] = [1, 1, WIDTH, HEIGHT - 1]  # a pixel too far
    data.write()
    assert data.warnings() == []


@pytest.mark.parametrize(
    "box", [["1", "2", "3", "4"], "1 2 3 4", [1, 2, 3], [1, 2, 3, [4]], {"x": 1}, [True, 1, 2, 3]]
)
def test_boxes_of_a_wrong_type_stop_the_run(data, box):
    for annotation in data.train["annotations"][::2]:
        annotation["bbox"] = box
    data.write()
    sentence = data.error()
    assert "annotations whose bbox is no list of four numbers: 6 (the first: id 1, " in sentence
    assert f"bbox {box!r}" in sentence


def test_null_in_a_box_is_like_nan(data):
    data.train["annotations"][4]["bbox"] = [1, None, 3, 4]
    data.val["annotations"][0]["bbox"] = [None] * 4
    data.write()
    assert data.warnings() == [(1, "boxes that are not four finite numbers")] * 2


def _mask_of(annotation):
    return {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]} | {"id": annotation["id"]}


def test_many_crowds_are_a_warning_and_only_crowds_an_error(data):
    for annotation in data.train["annotations"][::2]:
        annotation.update(iscrowd=1, segmentation=_mask_of(annotation))
    data.write()
    assert data.warnings() == [(6, "boxes marked as crowd (iscrowd 1), 50% of all")]
    (finding,) = data.report().findings
    assert "6 of them have masks in run-length form, which label tools mark" in finding.sentence()
    assert "write iscrowd 0" in finding.sentence()
    for annotation in data.train["annotations"]:
        annotation["iscrowd"] = True
    data.write()
    sentence = data.error()
    assert "no box to learn from, as all are marked as crowd (iscrowd 1): 12 " in sentence
    assert "write iscrowd 0" in sentence
    data.val["annotations"][0]["iscrowd"] = "0"
    data.write()
    assert "id 1, iscrowd '0'" in data.report().text()


def test_more_objects_than_the_model_finds(data):
    limits = Limits(
        Limit("model.queries.matching.num_queries", 2),
        Limit("model.postprocessor.max_detections", 3),
        Limit("dataloader.evaluator.max_detections", 1),
    )
    for annotation in data.val["annotations"][:2]:
        annotation.update(category_id=1, image_id=1)
    data.write()
    report = preflight([data.files("train"), data.files("val")], limits=limits)
    found = {(f.split, f.what): f for f in report.findings if "more objects" in f.what}
    assert [(split, what) for split, what in found] == [
        ("train", "images with more objects than the model has queries (2)"),
        ("val", "images with more objects than the model has queries (2)"),
        ("val", "images with more objects than the model gives detections (3)"),
        ("val", "images with more objects of one class than the evaluation looks at (1)"),
    ]
    queries, detections, evaluated = (f for (split, _), f in found.items() if split == "val")
    assert queries.count == 2 and queries.first == "1.jpg with 5"
    assert queries.remedy.endswith("set model.queries.matching.num_queries=50")
    assert detections.remedy.endswith("set model.postprocessor.max_detections=100")
    assert evaluated.first == "1.jpg with 3"
    assert evaluated.remedy.endswith("set dataloader.evaluator.max_detections=100")


def _crowded(data, numbers, queries, is_trained=False):
    """Of a train set with so many objects in its images."""
    data.train["images"] = [
        {"id": n, "file_name": f"{n}.jpg", "width": 400, "height": 300}
        for n in range(1, len(numbers) + 1)
    ]
    data.train["annotations"] = [
        {"image_id": image, "category_id": 1, "bbox": [3 * n % 350, 2 * n, 30, 20], "iscrowd": 0}
        for image, number in enumerate(numbers, start=1)
        for n in range(number)
    ]
    for number, annotation in enumerate(data.train["annotations"], start=1):
        annotation["id"] = number
    data.write()
    limit = Limit("model.queries.matching.num_queries", queries, is_trained)
    settings = PreflightSettings(images="off")
    report = preflight([data.files("train")], settings, limits=Limits(limit))
    return [finding for finding in report.findings if "queries" in finding.what]


def test_few_queries_for_each_object_are_told(data):
    (found,) = _crowded(data, [30, 4, 46, 45, 2], 60)
    assert found.what == "images with more objects than half of the model's queries (60)"
    assert (found.count, found.first) == (2, "3.jpg with 46")
    # Three for each of 46, rounded up.
    assert found.remedy == "many will not be found: set model.queries.matching.num_queries=150"
    (found,) = _crowded(data, [30, 4, 46, 45, 2], 60, is_trained=True)
    assert found.remedy.endswith("not be found: train with model.queries.matching.num_queries=150")
    assert _crowded(data, [30, 4, 46, 45, 2], 150) == []
    # More than there are, whatever the other images have.
    for numbers, queries in (([100] + 18 * [1], 150), ([80] + 17 * [2], 150)):
        (found,) = _crowded(data, numbers, queries)
        assert int(found.remedy.rsplit("=")[1]) >= 3 * numbers[0]
    # One image of many that is so crowded is no reason to make all of them slower.
    assert _crowded(data, [46] + 20 * [3], 60) == []
    (found,) = _crowded(data, [61] + 20 * [3], 60)
    assert found.what == "images with more objects than the model has queries (60)"
    assert found.remedy.endswith("num_queries=100")


def _with_objects(data, side):
    """Squares of so many pixels in images of 400 x 300."""
    for content in (data.train, data.val):
        for image in content["images"]:
            image.update(width=400, height=300)
        for annotation in content["annotations"]:
            annotation["bbox"] = [10 * annotation["category_id"], 20, side, side]
    data.write()


def test_sizes_of_objects_are_told_as_the_model_sees_them(data):
    _with_objects(data, 40)
    limits = Limits(input_size=InputSize(short_edge=192, max_size=320, stride=8))
    report = preflight([data.files("train")], PreflightSettings(images="off"), limits=limits)
    (sentence,) = report.splits[0].sizes
    # 40 * 192 / 300 = 25.6
    assert "half of the objects are smaller than 26 pixels (3.2 cells" in sentence
    assert f"train: {sentence}" in report.text()
    assert not [finding for finding in report.findings if "cells" in finding.what]


def test_objects_of_few_cells_get_the_override_that_helps(data):
    _with_objects(data, 20)
    limits = Limits(input_size=InputSize(short_edge=192, max_size=320, stride=8))
    report = preflight([data.files("train")], PreflightSettings(images="off"), limits=limits)
    (finding,) = [finding for finding in report.findings if "cells" in finding.what]
    assert finding.level == "warning" and "smaller than 3 cells of the finest level" in finding.what
    # 5 cells of 8 pixels from 20 * 192 / 300 = 12.8 pixels: 3.125 times as large.
    for part in (
        "dataloader.test.mapper.augmentations.short_edge=608",
        "dataloader.test.mapper.augmentations.max_size=1024",
        "'dataloader.train.mapper.augmentations.short_edges=[608]'",
        "about 10 times the time",
    ):
        assert part in finding.sentence(), finding.sentence()
    larger = Limits(input_size=InputSize(short_edge=608, max_size=1024, stride=8))
    report = preflight([data.files("train")], PreflightSettings(images="off"), limits=larger)
    assert not [finding for finding in report.findings if "cells" in finding.what]


def test_the_longer_side_may_bound_the_input(data):
    assert InputSize(192, 320, 8).scale(400, 300) == 0.64
    assert InputSize(192, 320, 8).scale(1600, 300) == 0.2
