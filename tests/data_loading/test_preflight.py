"""Every broken data set ends in one clear sentence or in an evaluation that still counts."""

from pathlib import Path

import numpy as np
import pytest

from co_detr.data.preflight import PreflightSettings, SplitFiles, preflight
from co_detr.errors import ConfigError
from tests.data_loading.preflight_data import HEIGHT, WIDTH

BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd"


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
