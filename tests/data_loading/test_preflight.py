"""Every broken data set ends in one clear sentence or in an evaluation that still counts."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from co_detr.data.coco import align_classes, class_names, load_coco
from co_detr.data.images import ImageReader
from co_detr.data.preflight import PreflightSettings, SplitFiles, preflight
from co_detr.data.preflight_boxes import InputSize, Limit, Limits
from co_detr.engine.evaluation import CocoBoxEvaluator
from co_detr.errors import ConfigError, DataError

WIDTH, HEIGHT = 48, 40
NAMES = ("cell", "disc", "plate")
BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd"


class Data:
    """A correct set of 4 train and 3 val images, as dicts that a test may damage before `write`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        rng = np.random.default_rng(0)
        self.train, self.val = self._split("train", 4, rng), self._split("val", 3, rng)

    def _split(self, name, count, rng):
        (self.root / name).mkdir()
        images, annotations = [], []
        for i in range(count):
            pixels = rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.root / name / f"{i}.jpg")
            images.append({"id": i, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT})
            for j in range(3):
                box = [2 + 3 * i, 1 + 12 * j, 14 + j, 11]
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": i, "category_id": j + 1, "bbox": box}
                )
        categories = [{"id": j + 1, "name": name} for j, name in enumerate(NAMES)]
        return {"images": images, "annotations": annotations, "categories": categories}

    def write(self, encoding="utf-8"):
        for name, content in (("train", self.train), ("val", self.val)):
            text = json.dumps(content, ensure_ascii=encoding == "utf-8")
            (self.root / f"{name}.json").write_bytes(text.encode(encoding))

    def files(self, split):
        return SplitFiles(split, str(self.root / f"{split}.json"), str(self.root / split))

    def report(self, invalid_boxes="skip", **settings):
        splits = [self.files("train"), self.files("val")]
        return preflight(splits, PreflightSettings(**settings), invalid_boxes)

    def error(self, **settings):
        """The sentence that stops the run."""
        with pytest.raises(DataError) as caught:
            self.report(**settings).raise_on_errors()
        sentence = str(caught.value)
        assert "\n" not in sentence and sentence.endswith(".")
        return sentence

    def warnings(self, **settings):
        """(count, defect) of what does not stop the run."""
        report = self.report(**settings)
        report.raise_on_errors()
        assert all(finding.what in report.text() for finding in report.findings)
        return [(finding.count, finding.what) for finding in report.findings]

    def perfect_ap(self):
        """AP of a model that detects every usable box of val, with train's class numbers."""
        train, val = self.files("train"), self.files("val")
        load_coco(train.annotations, train.images, invalid_boxes="skip")
        load_coco(val.annotations, val.images, invalid_boxes="skip")
        names = class_names(train.annotations)
        align_classes(val.annotations, names)
        evaluator = CocoBoxEvaluator(val.annotations, str(self.root))
        evaluator.reset()
        ids = {entry["id"]: names.index(entry["name"]) for entry in self.val["categories"]}
        for image in self.val["images"]:
            mine = [
                a
                for a in self.val["annotations"]
                if a["image_id"] == image["id"] and all(v > 0 for v in a["bbox"][2:])
            ]
            detections = Instances((image["height"], image["width"]))
            boxes = torch.tensor([a["bbox"] for a in mine], dtype=torch.float32).reshape(-1, 4)
            detections.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
            detections.scores = torch.ones(len(mine))
            detections.pred_classes = torch.tensor([ids[a["category_id"]] for a in mine])
            # Detections of classes that val does not know must neither count nor be written.
            others = detections[:1]
            for number in set(range(len(names))) - set(ids.values()):
                others.pred_classes = torch.tensor([number])
                detections = Instances.cat([detections, others])
            evaluator.process([{"image_id": image["id"]}], [{"instances": detections}])
        metrics = evaluator.evaluate()["bbox"]
        written = json.loads((self.root / "coco_instances_results.json").read_text())
        assert {detection["category_id"] for detection in written} <= ids.keys()
        return metrics


@pytest.fixture
def data(tmp_path):
    data = Data(tmp_path)
    data.write()
    return data


def test_correct_data(data):
    assert data.warnings() == []
    text = data.report().text()
    assert "cell (id 1), disc (id 2), plate (id 3)" in text and "no defects found" in text
    train, val = data.report().splits
    assert (train.images, train.boxes, train.empty, train.crowd, train.decoded) == (4, 12, 0, 0, 4)
    assert (val.images, val.boxes) == (3, 9)
    assert data.perfect_ap()["AP"] == pytest.approx(100)


# The twelve variants of the acceptance test, each with its one outcome.


def test_1_shifted_category_ids_in_val_are_matched_by_name(data):
    for entry in data.val["categories"]:
        entry["id"] -= 1
    for annotation in data.val["annotations"]:
        annotation["category_id"] -= 1
    data.write()
    assert data.warnings() == [(3, "categories with another id than in train")]
    assert data.perfect_ap()["AP"] == pytest.approx(100)


def test_1b_shifted_annotations_without_their_categories(data):
    for annotation in data.train["annotations"]:
        annotation["category_id"] -= 1
    data.write()
    sentence = data.error()
    assert "annotations of a category_id that is not in 'categories': 4" in sentence
    assert "shifted" in sentence and "train.json" in sentence


def test_2_gaps_in_the_ids_and_another_order_in_val(data):
    train_ids, val_ids = {1: 7, 2: 90, 3: 12}, {1: 55, 2: 3, 3: 20}
    for content, ids in ((data.train, train_ids), (data.val, val_ids)):
        for entry in content["categories"]:
            entry["id"] = ids[entry["id"]]
        for annotation in content["annotations"]:
            annotation["category_id"] = ids[annotation["category_id"]]
    data.val["annotations"] = [a for a in data.val["annotations"] if a["category_id"] != 55]
    data.val["annotations"][0]["bbox"][2] = 30
    data.write()
    assert (3, "categories with another id than in train") in data.warnings()
    metrics = data.perfect_ap()
    assert metrics["AP"] == pytest.approx(100)
    # every number stands beside the right name: cell has no box
    assert metrics["AP-disc"] == metrics["AP-plate"] == pytest.approx(100)
    assert np.isnan(metrics["AP-cell"])


def test_3_missing_image_file(data):
    (data.root / "train" / "2.jpg").unlink()
    sentence = data.error()
    assert "image files that do not exist: 1" in sentence and "2.jpg" in sentence
    assert "data.train_images" in sentence


def test_4_truncated_jpeg(data):
    path = data.root / "val" / "1.jpg"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    sentence = data.error()
    assert "image files that cannot be decoded: 1" in sentence and str(path) in sentence
    assert data.warnings(images="off") == []


def test_5_box_without_area(data):
    data.val["annotations"][0]["bbox"][2] = 0
    data.val["annotations"][5]["bbox"][3] = -3
    data.write()
    assert data.warnings() == [(2, "boxes that have no area")]
    assert data.perfect_ap()["AP"] == pytest.approx(100)
    assert "data.invalid_boxes=skip" in data.error(invalid_boxes="error")


def test_6_nan_box(data):
    data.train["annotations"][4]["bbox"][0] = float("nan")
    data.val["annotations"][0]["bbox"] = [1, 2, float("nan"), 4]
    data.write()
    assert data.warnings() == [(1, "boxes that are not four finite numbers")] * 2
    assert data.perfect_ap()["AP"] == pytest.approx(100)


def test_7_class_missing_in_val(data):
    data.val["categories"].pop(0)
    data.val["annotations"] = [a for a in data.val["annotations"] if a["category_id"] != 1]
    data.write()
    assert data.warnings() == [(1, "categories of train that val lacks")]
    metrics = data.perfect_ap()
    assert metrics["AP"] == pytest.approx(100)
    assert "AP-cell" not in metrics and metrics["AP-plate"] == pytest.approx(100)


def test_8_duplicate_ids(data):
    for annotation in data.val["annotations"]:
        annotation["id"] = 0  # the COCO API by itself would count each of them as missed
    data.write()
    assert data.warnings() == [(1, "annotation ids that occur twice or are missing")]
    assert data.perfect_ap()["AP"] == pytest.approx(100)
    for number, annotation in enumerate(data.val["annotations"], start=1):
        annotation["id"] = number
    del data.val["annotations"][0]["id"]
    data.write()
    assert data.warnings() == [(1, "annotation ids that occur twice or are missing")]
    assert data.perfect_ap()["AP"] == pytest.approx(100)
    data.train["images"][1]["id"] = 0
    data.write()
    assert "image ids that occur twice: 1 (the first: 0); make the ids unique" in data.error()


@pytest.mark.parametrize("split", ["train", "val"])
def test_9_all_images_empty(data, split):
    getattr(data, split)["annotations"] = []
    data.write()
    assert "has no box to" in data.error()
    getattr(data, split)["images"] = []
    data.write()
    assert f"data.{split}" in data.error() and "empty list of images" in data.error()


def test_10_wrong_image_size(data):
    data.train["images"][3].update(width=HEIGHT, height=WIDTH)
    data.write()
    sentence = data.error()
    assert "3.jpg is 48x40, not 40x48" in sentence and "EXIF" in sentence


def test_11_names_that_are_not_utf8(data):
    data.train["categories"][0]["name"] = "célula"
    data.write(encoding="latin-1")
    assert "train.json is not UTF-8 (byte 0xe9" in data.error()
    # a file name as Python and json carry bytes that are not UTF-8
    data.train["categories"][0]["name"] = "cell"
    data.train["images"][0]["file_name"] = "caf\udce9.jpg"
    data.write()
    assert "images whose file_name is not UTF-8 text: 1" in data.error()
    data.error().encode()  # can be printed


def test_12_category_removed_from_train(data):
    removed = data.train["categories"].pop(1)
    data.write()
    assert "annotations of a category_id that is not in 'categories': 4" in data.error()
    data.train["annotations"] = [
        a for a in data.train["annotations"] if a["category_id"] != removed["id"]
    ]
    data.write()
    sentence = data.error()
    assert "categories that train lacks (it has cell, plate): 1" in sentence and "disc" in sentence


def test_harmless_oddities_are_counted(data):
    data.train["annotations"][0]["bbox"] = [-9, 2, 20, 10]
    data.train["annotations"][1]["bbox"] = [100, 2, 20, 10]
    data.train["annotations"].append(data.train["annotations"][2] | {"id": 99})
    data.train["annotations"][5]["iscrowd"] = 1
    data.train["annotations"][6:9] = []
    data.write()
    assert data.warnings() == [
        (1, "boxes that are outside their image"),
        (1, "boxes that are partly outside their image"),
        (1, "boxes that occur twice (image, category, box)"),
    ]
    train = data.report().splits[0]
    assert (train.boxes, train.crowd, train.empty) == (8, 1, 1)


def test_images_of_both_splits(data):
    files = data.files("train")
    report = preflight([files, SplitFiles("val", files.annotations, files.images)])
    assert [(f.count, f.what) for f in report.findings] == [(4, "images that are in train, too")]


def test_only_val_is_inspected_when_only_val_is_given(data):
    report = preflight([data.files("val")])
    assert [split.split for split in report.splits] == ["val"] and report.findings == []


@pytest.mark.parametrize(
    ("key", "index", "change"),
    [
        ("images", 0, {"id": [1]}),
        ("images", 0, {"id": "1"}),
        ("images", 0, {"file_name": None}),
        ("images", 0, {"width": "48"}),
        ("categories", 1, {"id": None}),
        ("categories", 1, {"id": "2"}),
        ("categories", 1, {"id": 1}),
        ("annotations", 2, {"category_id": [1]}),
        ("annotations", 2, {"image_id": {}}),
        ("annotations", 2, {"iscrowd": "no"}),
    ],
)
def test_values_of_a_wrong_type_end_in_a_sentence(data, key, index, change):
    data.train[key][index].update(change)
    data.write()
    assert "train.json has" in data.error()


@pytest.mark.parametrize("key", ["images", "categories", "annotations"])
def test_missing_keys_end_in_a_sentence(data, key):
    del data.train[key][1]["image_id" if key == "annotations" else "id"]
    data.write()
    assert f"entries of '{key}' that lack a key" in data.error()


def test_sampling_and_reading_all(data):
    assert [split.decoded for split in data.report(sample_size=2).splits] == [2, 2]
    assert [split.decoded for split in data.report(images="all", sample_size=1).splits] == [4, 3]
    assert [split.decoded for split in data.report(images="off").splits] == [0, 0]


@pytest.mark.parametrize("settings", [{"images": "some"}, {"sample_size": 0}])
def test_wrong_settings(settings):
    with pytest.raises(ConfigError, match=r"data\.preflight\."):
        PreflightSettings(**settings)


# What shows over the whole file.


def _rewrite(data, function, split="train"):
    """Gives every box another notation."""
    sizes = {
        image["id"]: (image["width"], image["height"]) for image in getattr(data, split)["images"]
    }
    for annotation in getattr(data, split)["annotations"]:
        annotation["bbox"] = function(*annotation["bbox"], *sizes[annotation["image_id"]])
    data.write()


@pytest.mark.parametrize(
    ("function", "kind", "mend"),
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
def test_boxes_in_another_notation_stop_the_run(data, function, kind, mend):
    rng = np.random.default_rng(3)
    for annotation in data.train["annotations"]:
        w, h = rng.integers(8, 20, 2)
        x, y = rng.integers(0, WIDTH - w), rng.integers(0, HEIGHT - h)
        annotation["bbox"] = [int(value) for value in (x, y, w, h)]
    data.write()
    data.warnings()  # as (x, y, w, h) they are right
    _rewrite(data, function)
    sentence = data.error()
    assert f"{kind}" in sentence and mend in sentence and "train.json" in sentence
    assert "more kind" not in sentence  # what follows from it is not told as well
    assert kind in data.error(invalid_boxes="error")


def test_who_knows_better_can_go_on(data):
    """The judgement is a likely one: large labels at the right edge look like corners."""
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
        Limit("model.queries.0.num_queries", 2),
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
    assert queries.mend.endswith("set model.queries.0.num_queries=100")
    assert detections.mend.endswith("set model.postprocessor.max_detections=100")
    assert evaluated.first == "1.jpg with 3"
    assert evaluated.mend.endswith("set dataloader.evaluator.max_detections=100")


def test_mended_values_are_counted_and_do_not_change_the_ap(data):
    for content in (data.train, data.val):
        for annotation in content["annotations"]:
            annotation["area"] = None
    for image in data.val["images"]:
        image["id"] = float(image["id"])
    for annotation in data.val["annotations"]:
        annotation["image_id"] = float(annotation["image_id"])
        annotation["category_id"] = float(annotation["category_id"])
    for category in data.val["categories"]:
        category["id"] = float(category["id"])
    data.write()
    assert sorted(data.warnings()) == [
        (9, "annotations whose area is no positive number"),
        (12, "annotations whose area is no positive number"),
        (24, "ids that are written with a decimal point"),
    ]
    assert data.perfect_ap()["AP"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"category_id": "1"}, "category_id '1'); add the categories or correct the ids ('1' is n"),
        ({"category_id": "1.0"}, "correct the ids ('1.0' is not 1: write numbers in both lists"),
        (
            {"image_id": "0"},
            "image_id '0'); add the images or remove the annotations ('0' is not 0",
        ),
        ({"category_id": 1.5}, "category_id 1.5); add"),
        ({"category_id": 0}, "category_id 0); add the categories or correct the ids (are they sh"),
    ],
)
def test_ids_are_told_apart_in_messages(data, change, sentence):
    data.train["annotations"][0].update(change)
    data.write()
    assert sentence in data.error()


def test_text_and_numbers_as_ids_of_images(data):
    for image in data.train["images"][1:]:
        image["id"] = str(image["id"])
    data.write()
    assert "mix of numbers and text as image ids: 1 (the first: 0 and '1')" in data.error()


def test_file_names_of_another_system(data):
    for image in data.train["images"]:
        image["file_name"] = f"C:\\data\\train\\{image['file_name']}"
    data.write()
    assert data.warnings() == [(4, "image files that are not where the json says")]
    assert f"found at {data.root / 'train' / '0.jpg'}" in data.report().text()
    data.train["images"][0]["file_name"] = "0.png"
    data.write()
    assert f"({data.root / 'train' / '0.jpg'} has a similar name)" in data.error()


def test_two_classes_of_one_name_are_kept_apart(data):
    for content in (data.train, data.val):
        content["categories"][2]["name"] = "cell"
    data.write()
    assert data.warnings() == [(1, "category names that occur twice")] * 2
    assert "told apart by its id as in 'cell (id 1)'" in data.report().text()
    names = dict(zip((1, 2, 3), ("cell (id 1)", "disc", "cell (id 3)"), strict=True))
    for annotation in data.val["annotations"]:
        if annotation["category_id"] == 3:
            annotation["bbox"][2] = 30
    data.write()
    for category in data.val["categories"]:  # as `perfect_ap` looks them up
        category["name"] = names[category["id"]]
    metrics = data.perfect_ap()
    assert metrics["AP-cell (id 1)"] == metrics["AP-cell (id 3)"] == pytest.approx(100)
    assert [row.split(",")[0] for row in (data.root / "per_class_ap.csv").open()] == [
        "class",
        *names.values(),
    ]


def test_names_that_differ_in_letter_case_only(data):
    data.val["categories"][0]["name"] = "Cell "
    data.write()
    assert "'Cell '); give both" in data.error() and "train has 'cell'" in data.error()


@pytest.mark.skipif(not BCCD.is_dir(), reason="the blood-cell data set is not here")
def test_a_real_data_set():
    splits = [
        SplitFiles(split, str(BCCD / f"{split}.json"), str(BCCD / "images"))
        for split in ("train", "val")
    ]
    report = preflight(splits)
    report.raise_on_errors()
    assert [len(split.categories) for split in report.splits] == [3, 3]


# Images with more than 8 bits per channel, and sizes.


def write_deep(data, values, suffix="png"):
    """Gives all images random values from `values` (low, high), of the type of `low`."""
    low, high = values
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for image in getattr(data, split)["images"]:
            image["file_name"] = f"deep_{image['id']}.{suffix}"
            pixels = low + (high - low) * rng.random((HEIGHT, WIDTH))
            Image.fromarray(pixels.astype(low.dtype)).save(data.root / split / image["file_name"])
    data.write()


def deep_report(data, value_range=None):
    splits = [data.files("train"), data.files("val")]
    return preflight(splits, reader=ImageReader(value_range))


def test_values_that_use_a_small_part_of_their_type(data):
    write_deep(data, np.array([300, 4380], np.uint16))
    report = deep_report(data)
    assert "7 images have more than 8 bits: 0 to 65535 (the range of their type)" in report.text()
    (finding,) = report.findings
    assert finding.level == "warning" and finding.count == 7
    assert "small part of the range of their type, 0 to 65535" in finding.what
    suggested = re.search(r"data.value_range=(\[\d+,\d+\])", finding.mend).group(1)
    assert np.abs(np.array(json.loads(suggested)) - [300, 4380]).max() < 30
    with_range = deep_report(data, json.loads(suggested))
    assert with_range.findings == [] and "(data.value_range) becomes" in with_range.text()


@pytest.mark.parametrize("kind", [np.uint16, np.uint8])
def test_values_that_use_their_range_are_fine(data, kind):
    write_deep(data, np.array([0, np.iinfo(kind).max], kind))
    assert deep_report(data).findings == []


def test_values_outside_the_range(data):
    write_deep(data, np.array([1000, 60000], np.uint16))
    (finding,) = deep_report(data, (0, 255)).findings
    assert (
        finding.count == 7 and "most of whose values lie outside data.value_range" in finding.what
    )


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_values_whose_range_is_not_known(data, kind):
    write_deep(data, np.array([-500, 1500], kind), "tif")
    with pytest.raises(DataError, match=r"without data.value_range: 7 .*use \[-49\d.*,149\d"):
        deep_report(data).raise_on_errors()
    assert deep_report(data, (-500, 1500)).findings == []


def test_values_that_are_no_numbers(data):
    write_deep(data, np.array([0, 1], np.float32), "tif")
    path = data.root / "val" / "deep_1.tif"
    Image.fromarray(np.full((HEIGHT, WIDTH), np.nan, np.float32)).save(path)
    (finding,) = deep_report(data, (0, 1)).findings
    assert finding.level == "error" and finding.count == 1 and str(path) in finding.first


def test_images_that_are_very_thin_or_too_large(data):
    Image.new("RGB", (1000, 1)).save(data.root / "train" / "0.jpg")
    data.train["images"][0].update(width=1000, height=1)
    data.train["annotations"] = data.train["annotations"][3:]
    data.write()
    assert (1, "images that are more than 100 times as long as wide") in data.warnings()
    limit = preflight([data.files("train")], reader=ImageReader(max_pixels=1500))
    assert [(each.count, each.what) for each in limit.errors] == [
        (3, "images with more pixels than data.max_image_pixels")
    ]
    assert "raise data.max_image_pixels" in limit.errors[0].mend


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
    assert not [each for each in report.findings if "cells" in each.what]


def test_objects_of_few_cells_get_the_override_that_helps(data):
    _with_objects(data, 20)
    limits = Limits(input_size=InputSize(short_edge=192, max_size=320, stride=8))
    report = preflight([data.files("train")], PreflightSettings(images="off"), limits=limits)
    (finding,) = [each for each in report.findings if "cells" in each.what]
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
    assert not [each for each in report.findings if "cells" in each.what]


def test_the_longer_side_may_bound_the_input(data):
    assert InputSize(192, 320, 8).scale(400, 300) == 0.64
    assert InputSize(192, 320, 8).scale(1600, 300) == 0.2
