"""A data set cut into tiles: boxes, masks, crowds, and what is said of the rest."""

import json

import numpy as np
import pycocotools.mask as mask_utils
import pytest
from PIL import Image

from co_detr.data.preflight import SplitFiles, preflight
from co_detr.engine.views import Tiles
from co_detr.errors import ConfigError, DataError
from co_detr.tools.slice_dataset import parse_arguments, run, slice_dataset
from tests.engine.masked import ellipse

# In an image of 100 x 40, with two tiles of 60: from 0 to 60 and from 40 to 100.
BOXES = {
    "left": [5, 5, 20, 20],
    "in both": [44, 10, 10, 10],
    "mostly right": [50, 2, 30, 10],  # a third of it is in the left one
    "half": [50, 20, 20, 10],
    "crowd": [30, 30, 40, 8],
    "outside": [200, 200, 5, 5],
}


@pytest.fixture
def dataset(tmp_path):
    """Two images, the second of which is empty and no larger than a tile."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 100, 3), dtype=np.uint8)
    (tmp_path / "images" / "sub").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "images" / "sub" / "a.png")
    Image.fromarray(pixels[:, :50]).save(tmp_path / "images" / "b.jpg")
    annotations = [
        {"id": number, "image_id": 7, "category_id": 2, "bbox": box, "area": box[2] * box[3]}
        | {"iscrowd": int(name == "crowd"), "note": name}
        for number, (name, box) in enumerate(BOXES.items(), start=1)
    ]
    content = {
        "images": [
            {"id": 7, "file_name": "sub/a.png", "width": 100, "height": 40},
            {"id": 9, "file_name": "b.jpg", "width": 50, "height": 40},
        ],
        "annotations": annotations,
        "categories": [{"id": 2, "name": "cell"}],
    }
    (tmp_path / "train.json").write_text(json.dumps(content))
    return tmp_path


def slices(dataset, *options):
    arguments = [str(dataset / "train.json"), "--images", str(dataset / "images")]
    arguments += ["--output", str(dataset / "tiles"), "--size", "60", *options]
    run(parse_arguments(arguments))
    return json.loads((dataset / "tiles" / "train.json").read_text())


def found_in(content, tile):
    """note -> (box, iscrowd) in one of the tiles."""
    return {
        entry["note"]: (entry["bbox"], entry["iscrowd"])
        for entry in content["annotations"]
        if entry["image_id"] == content["images"][tile]["id"]
    }


def test_boxes_are_those_of_what_is_seen(dataset, capsys):
    content = slices(dataset)
    assert found_in(content, 0) == {
        "left": ([5, 5, 20, 20], 0),
        "in both": ([44, 10, 10, 10], 0),
        "mostly right": ([50, 2, 10, 10], 1),  # too little: it is neither learned nor counted
        "half": ([50, 20, 10, 10], 0),
        "crowd": ([30, 30, 30, 8], 1),
    }
    assert found_in(content, 1) == {
        "in both": ([4, 10, 10, 10], 0),
        "mostly right": ([10, 2, 30, 10], 0),
        "half": ([10, 20, 20, 10], 0),
        "crowd": ([0, 30, 30, 8], 1),
    }
    assert found_in(content, 2) == {}
    said = capsys.readouterr().out
    assert "2 images became 3 tiles (0 more were empty" in said
    assert "4 objects became 5 whole ones, 1 parts that are learned as objects, and 1" in said
    assert "1 boxes without area in their image were left out" in said
    assert "not to be learned" not in said


def test_pictures_are_cut_where_the_boxes_are(dataset):
    content = slices(dataset)
    whole = np.asarray(Image.open(dataset / "images" / "sub" / "a.png"))
    first, second, third = content["images"]
    for entry in (first, second):
        left, top = entry["tile"]["left"], entry["tile"]["top"]
        cut = np.asarray(Image.open(dataset / "tiles" / "images" / entry["file_name"]))
        assert np.array_equal(cut, whole[top : top + 40, left : left + 60])
        assert (entry["width"], entry["height"]) == (60, 40)
        assert entry["tile"]["image_id"] == 7
    assert third["file_name"].endswith(".jpg") and third["width"] == 50
    files = SplitFiles("train", str(dataset / "tiles/train.json"), str(dataset / "tiles/images"))
    preflight([files]).raise_on_errors()


def test_masks_are_cut_too(dataset):
    path = dataset / "train.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation["segmentation"] = [ellipse(annotation["bbox"])]
    path.write_text(json.dumps(content))
    sliced = slices(dataset)
    half = next(entry for entry in sliced["annotations"] if entry["note"] == "half")
    pixels = mask_utils.decode(half["segmentation"])
    assert pixels.shape == (40, 60) and half["area"] == pixels.sum() > 0
    assert half["bbox"] == list(mask_utils.toBbox(half["segmentation"]))
    assert half["bbox"][0] == 50 and half["bbox"][2] == 10 and half["iscrowd"] == 0
    thin = next(entry for entry in sliced["annotations"] if entry["note"] == "mostly right")
    assert thin["iscrowd"] == 1


def test_objects_that_no_tile_shows_enough_of_are_named(dataset, capsys):
    slices(dataset, "--size", "12", "--overlap", "0", "--without-empty")
    said = capsys.readouterr().out
    assert "1 objects are not to be learned in any tile" in said or "objects are not to be" in said
    assert "annotation 1 of sub/a.png" in said and "take larger tiles" in said
    assert "(0 more were empty" not in said


def test_what_is_wrong_is_said(dataset):
    slices(dataset)
    with pytest.raises(ConfigError, match="exists: choose another --output, or add --force"):
        slices(dataset)
    with pytest.raises(ConfigError, match="--min-visible 0.0 must be above 0"):
        slices(dataset, "--min-visible", "0", "--force")
    Image.new("RGB", (30, 30)).save(dataset / "images" / "b.jpg")
    with pytest.raises(DataError, match="b.jpg is 30x30, not 50x40"):
        slices(dataset, "--force")
    # Of a large set not every image is looked at before.
    files = dataset / "train.json", dataset / "images", dataset / "tiles"
    with pytest.raises(DataError, match="b.jpg is 30x30 but .* says 50x40: write the true size"):
        slice_dataset(*files, Tiles(60), min_visible=0.4)


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        ("annotations", "image_id", 8, "an image_id that is not in 'images'"),
        ("annotations", "image_id", None, "lack a key"),
        ("annotations", "bbox", None, "lack a key"),
        ("images", "file_name", None, "lack a key"),
    ],
)
def test_what_a_training_would_stop_at(dataset, kind, key, value, message):
    content = json.loads((dataset / "train.json").read_text())
    del content[kind][0][key]
    if value is not None:
        content[kind][0][key] = value
    (dataset / "train.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        slices(dataset)
    assert not (dataset / "tiles").exists()
