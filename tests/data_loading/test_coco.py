"""Every mistake in a data set is one sentence that names where it is and how to correct it."""

import json
import logging

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from PIL import Image

from co_detr.data.coco import load_coco
from co_detr.data.coco_classes import align_classes, class_names, dataset_name
from co_detr.data.loader import CheckedDatasetMapper
from co_detr.errors import ConfigError, DataError


@pytest.fixture
def content(tmp_path):
    """A correct file of two 40x30 images; the second has no box."""
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / name)
    return {
        "images": [
            {"id": 9, "file_name": "b.png", "width": 40, "height": 30},
            {"id": 4, "file_name": "a.png", "width": 40, "height": 30},
        ],
        "annotations": [
            {"id": 1, "image_id": 4, "category_id": 20, "bbox": [5, 6, 10, 8]},
            {"id": 2, "image_id": 4, "category_id": 3, "bbox": [0, 0, 40, 30], "iscrowd": 1},
        ],
        "categories": [{"id": 20, "name": "plate"}, {"id": 3, "name": "cell"}],
    }


def _load(tmp_path, content, **kwargs):
    path = tmp_path / "set.json"
    path.write_text(json.dumps(content))
    return load_coco(str(path), str(tmp_path), **kwargs)


def _error(tmp_path, content, error=DataError, **kwargs):
    with pytest.raises(error) as caught:
        _load(tmp_path, content, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_records_and_metadata(tmp_path, content):
    records = _load(tmp_path, content, num_classes=2)
    assert [record["image_id"] for record in records] == [4, 9]
    assert records[0]["file_name"] == str(tmp_path / "a.png")
    # categories become contiguous in the order of their ids
    assert [a["category_id"] for a in records[0]["annotations"]] == [1, 0]
    assert [a["iscrowd"] for a in records[0]["annotations"]] == [0, 1]
    assert records[1]["annotations"] == []  # images without boxes are kept
    metadata = MetadataCatalog.get(dataset_name(str(tmp_path / "set.json")))
    assert metadata.thing_classes == ["cell", "plate"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 20: 1}


def test_a_file_can_be_loaded_again_after_a_change(tmp_path, content):
    _load(tmp_path, content)
    content["categories"].append({"id": 5, "name": "disc"})
    _load(tmp_path, content, num_classes=3)


def test_missing_file_and_directory(tmp_path, content):
    with pytest.raises(DataError, match=r"nowhere\.json does not exist: set data\.train"):
        load_coco(str(tmp_path / "nowhere.json"), str(tmp_path))
    _load(tmp_path, content)
    with pytest.raises(DataError, match=r"nowhere does not exist: set data\.train_images"):
        load_coco(str(tmp_path / "set.json"), str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid json"),
        ("[]", "not in COCO format: it has no list 'images'"),
        ('{"images": [], "annotations": []}', "not in COCO format: it has no list 'categories'"),
        ('{"images": [1], "annotations": [], "categories": []}', "no list 'images' of objects"),
    ],
)
def test_files_that_are_not_coco(tmp_path, text, message):
    (tmp_path / "set.json").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        load_coco(str(tmp_path / "set.json"), str(tmp_path))
    assert "set.json" in str(caught.value)


def test_wrong_number_of_classes(tmp_path, content):
    message = _error(tmp_path, content, num_classes=80)
    assert "has 2 categories (cell, plate) but the model has 80" in message
    assert "set model.num_classes=2" in message


def test_unknown_category(tmp_path, content):
    content["annotations"][0]["category_id"] = 7
    message = _error(tmp_path, content)
    assert "annotation 1 of" in message and "a.png" in message and "category_id 7" in message


def test_annotation_of_an_unknown_image(tmp_path, content):
    content["annotations"][0]["image_id"] = 7
    assert "annotation 1 of" in _error(tmp_path, content)


def test_missing_keys(tmp_path, content):
    del content["annotations"][1]["bbox"]
    assert "annotation 2 of" in _error(tmp_path, content)
    content["annotations"].pop()
    del content["images"][1]["height"]
    assert "image a.png" in _error(tmp_path, content)


def test_missing_image_file(tmp_path, content):
    (tmp_path / "b.png").unlink()
    message = _error(tmp_path, content)
    assert str(tmp_path / "b.png") in message and "does not exist" in message


def test_duplicate_ids(tmp_path, content):
    content["images"][0]["id"] = 4
    assert "image id 4" in _error(tmp_path, content)
    content["images"][0]["id"] = 9
    content["categories"][0]["id"] = 3
    assert "repeats an id" in _error(tmp_path, content)


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        ([5, 6, 0, 8], "has no area"),
        ([5, 6, 10, -8], "has no area"),
        ([50, 6, 10, 8], "is outside the 40x30 image"),
        ([5, -20, 10, 8], "is outside the 40x30 image"),
        ([5, float("nan"), 10, 8], "is not four finite numbers"),
        ([5, 6, float("inf"), 8], "is not four finite numbers"),
        ([5, None, 10, 8], "is not four finite numbers"),
    ],
)
def test_boxes_without_area_in_their_image(tmp_path, content, caplog, box, problem):
    content["annotations"][0]["bbox"] = box
    message = _error(tmp_path, content)
    assert problem in message and "annotation 1 of image" in message and "a.png" in message
    assert "data.invalid_boxes=skip" in message
    # ... which is the remedy:
    records = _load(tmp_path, content, invalid_boxes="skip")
    assert len(records[0]["annotations"]) == 1
    assert "1 boxes have no area inside their image and were left out" in caplog.text


@pytest.mark.parametrize("box", [[5, 6, 10], "box", ["5", "6", "10", "8"], [5, 6, 10, True], None])
def test_boxes_of_a_wrong_type_always_stop(tmp_path, content, box):
    content["annotations"][0]["bbox"] = box
    message = _error(tmp_path, content, invalid_boxes="skip")
    assert f"has the bbox {box!r}, which is no list of four numbers" in message


def test_boxes_partly_outside_are_clipped_with_one_warning(tmp_path, content, caplog):
    content["annotations"][0]["bbox"] = [-5, 6, 10, 100]
    content["annotations"][1]["bbox"] = [30, 20, 20, 20]
    with caplog.at_level(logging.WARNING):
        records = _load(tmp_path, content)
    assert [a["bbox"] for a in records[0]["annotations"]] == [[0, 6, 5, 24], [30, 20, 10, 10]]
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1 and "2 boxes are partly outside" in warnings[0]


def test_unknown_choice_for_invalid_boxes(tmp_path, content):
    assert "data.invalid_boxes" in _error(tmp_path, content, ConfigError, invalid_boxes="drop")


def test_classes_are_aligned_by_name(tmp_path, content):
    _load(tmp_path, content)
    path = str(tmp_path / "set.json")
    align_classes(path, ["cell", "plate"])
    assert class_names(path) == ["cell", "plate"]
    align_classes(path, ["plate", "disc", "cell"])
    assert class_names(path) == ["plate", "disc", "cell"]
    ids = MetadataCatalog.get(dataset_name(path)).thing_dataset_id_to_contiguous_id
    assert (ids[20], ids[3]) == (0, 2) and sorted(ids.values()) == [0, 1, 2]


@pytest.mark.parametrize("names", [["cell", "disc"], ["cell"], ["cell", "plate", "plate"]])
def test_classes_that_cannot_be_aligned(tmp_path, content, names):
    _load(tmp_path, content)
    with pytest.raises(DataError, match=r"\(cell, plate\) but the model is for"):
        align_classes(str(tmp_path / "set.json"), names)


def test_a_val_set_may_have_fewer_classes_than_the_model(tmp_path, content):
    _load(tmp_path, content, num_classes=3, partial_classes=True)
    assert "has 2 categories" in _error(tmp_path, content, num_classes=1, partial_classes=True)


def _map(record):
    mapper = CheckedDatasetMapper(is_train=True, augmentations=[], image_format="RGB")
    return mapper(record)


def test_mapper_keeps_boxes_and_leaves_crowds_out(tmp_path, content):
    sample = _map(_load(tmp_path, content)[0])
    assert sample["image"].shape == (3, 30, 40)
    assert sample["instances"].gt_boxes.tensor.tolist() == [[5, 6, 15, 14]]
    assert sample["instances"].gt_classes.tolist() == [1]


def test_scores_weigh_objects_when_asked_for(tmp_path, content, caplog):
    caplog.set_level(logging.INFO, "co_detr")
    first = content["annotations"][0]
    content["annotations"] += [first | {"id": 3, "score": 0.25}, first | {"id": 4, "score": 1}]
    content["annotations"][1]["score"] = 0.0  # of a crowd, which weighs nothing anyway
    assert not _map(_load(tmp_path, content)[0])["instances"].has("gt_weights")
    records = _load(tmp_path, content, score_weights=True)
    assert "1 of 3 boxes have one below 1, 0.25 on average." in caplog.text
    assert _map(records[0])["instances"].gt_weights.tolist() == [1.0, 0.25, 1.0]
    assert not _map(records[1])["instances"].has("gt_weights")  # has no object
    del content["annotations"][2:]
    _load(tmp_path, content, score_weights=True)
    assert "to be weighed by scores (score_weights), but no box has a score below 1" in caplog.text


@pytest.mark.parametrize("score", [0, 1.5, -0.1, "high", True, None, float("nan")])
def test_scores_that_are_no_weights(tmp_path, content, score):
    content["annotations"][0]["score"] = score
    _load(tmp_path, content)  # where nobody asks
    message = _error(tmp_path, content, score_weights=True)
    assert f"annotation 1 of {tmp_path / 'set.json'} has the score {score!r}" in message
    assert "score_weights=false" in message


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_image_that_cannot_be_decoded(tmp_path, content, damage):
    records = _load(tmp_path, content)
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)).save(path)
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "text": b"not an image", "empty": b""}[damage]
    )
    with pytest.raises(DataError, match="cannot be decoded") as caught:
        _map(records[0])
    assert str(path) in str(caught.value)


def test_image_of_another_size_than_annotated(tmp_path, content):
    content["images"][1]["width"] = 50
    records = _load(tmp_path, content)
    with pytest.raises(DataError, match=r"a\.png is 40x30 but its annotation file says 50x30"):
        _map(records[0])
