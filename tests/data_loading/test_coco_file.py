"""Annotation files as people have them: encodings, ids, areas and names of other systems."""

import json
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from co_detr.data.coco import load_coco, load_objects365
from co_detr.data.coco_classes import class_names
from co_detr.data.coco_file import display_names, locate_files, read_coco
from co_detr.errors import DataError


def content(**changes):
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 5]} | changes
    return {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}],
        "annotations": [annotation],
        "categories": [{"id": 1, "name": "cell"}],
    }


def read(tmp_path, data):
    path = tmp_path / "set.json"
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return read_coco(str(path))


ENCODINGS = ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encodings(tmp_path, encoding):
    data = content()
    data["categories"][0]["name"] = "célula 细胞"
    text = json.dumps(data, ensure_ascii=False)
    assert read(tmp_path, text.encode(encoding)).categories[0]["name"] == "célula 细胞"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"\x1f\x8b\x08\x00", "compressed with gzip"),
        (b"<!DOCTYPE html>", "web page"),
        (b'{"images": "caf\xe9"}', "is not UTF-8 .byte 0xe9 at position 15."),
        (b'{"images": [', "is not valid json"),
        (b"[" * 100_000, "is not valid json .*recursion"),
    ],
)
def test_files_that_are_no_json(tmp_path, data, sentence):
    with pytest.raises(DataError, match=f"set.json {sentence}|set.json .*{sentence}"):
        read(tmp_path, data)


def test_a_folder_is_no_annotation_file(tmp_path):
    with pytest.raises(DataError, match="is a folder: set data.train"):
        read_coco(str(tmp_path))


def test_whole_floats_are_ids_everywhere(tmp_path):
    data = content(id=1.0, image_id=1.0, category_id=1.0)
    data["images"][0].update(id=1.0, width=40.0, height=30.0, neg_category_ids=[1.0])
    data["categories"][0]["id"] = 1.0
    file = read(tmp_path, data)
    image, annotation = file.images[0], file.annotations[0]
    values = [image["id"], image["width"], image["height"], file.categories[0]["id"]]
    values += [annotation["id"], annotation["image_id"], annotation["category_id"]]
    values += image["neg_category_ids"]
    assert all(type(value) is int for value in values)
    ((correction, cases),) = file.corrected.items()
    assert "decimal point" in correction.what and len(cases) == 5
    # ... but one and a half is none, and neither is text.
    data["images"][0]["id"], data["annotations"][0]["image_id"] = 1.5, "1.0"
    file = read(tmp_path, data)
    assert file.images[0]["id"] == 1.5 and file.annotations[0]["image_id"] == "1.0"


@pytest.mark.parametrize("area", [None, "50", -3, 0, float("nan"), True, [50]])
def test_areas_that_are_none_are_computed(tmp_path, area):
    file = read(tmp_path, content(area=area))
    assert file.annotations[0]["area"] == 50
    ((correction, cases),) = file.corrected.items()
    assert "area" in correction.what and repr(area) in cases[0]


def test_areas_that_are_right_stay(tmp_path):
    file = read(tmp_path, content(area=33.5))
    assert file.annotations[0]["area"] == 33.5 and not file.corrected
    file = read(tmp_path, content())  # need not be there
    assert file.annotations[0]["area"] == 50 and not file.corrected


@pytest.mark.parametrize(
    ("crowd", "expected"), [(None, 0), (False, 0), (True, 1), (1.0, 1), ("0", "0"), (2, 2)]
)
def test_crowds(tmp_path, crowd, expected):
    crowd = read(tmp_path, content(iscrowd=crowd)).annotations[0]["iscrowd"]
    assert crowd == expected and type(crowd) is type(expected)


MASK = np.zeros((30, 40), np.uint8, order="F")
MASK[4:9, 3:13] = 1


def _counts(mask):
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    return np.diff([0, *edges, flat.size]).tolist()


@pytest.mark.parametrize("bbox", ["absent", None, []])
@pytest.mark.parametrize(
    "segmentation",
    [
        [[3, 4, 13, 4, 13, 9], [5, 5, 6, 5, 6, 9]],
        {"size": [30, 40], "counts": _counts(MASK)},
    ],
)
def test_boxes_of_segmentations(tmp_path, bbox, segmentation):
    data = content(segmentation=segmentation, bbox=bbox)
    if bbox == "absent":
        del data["annotations"][0]["bbox"]
    file = read(tmp_path, data)
    assert file.annotations[0]["bbox"] == [3, 4, 10, 5] and file.annotations[0]["area"] == 50
    assert [correction.how for correction in file.corrected] == ["taken from their segmentation"]


@pytest.mark.parametrize(
    "segmentation", [None, [], [[1, 2]], [["a"] * 6], {"size": [30], "counts": []}, "x", [7]]
)
def test_no_box_at_all(tmp_path, segmentation):
    data = content(segmentation=segmentation)
    del data["annotations"][0]["bbox"]
    assert "bbox" not in read(tmp_path, data).annotations[0]


def test_class_names_are_the_same_in_every_unicode_form(tmp_path):
    data = content()
    data["categories"][0]["name"] = unicodedata.normalize("NFD", "ápice")
    assert read(tmp_path, data).categories[0]["name"] == unicodedata.normalize("NFC", "ápice")


def test_names_that_occur_twice_are_told_apart():
    categories = [{"id": 7, "name": "apple"}, {"id": 3, "name": "apple"}, {"id": 4, "name": "pear"}]
    expected = {3: "apple (id 3)", 4: "pear", 7: "apple (id 7)"}
    assert display_names(categories) == expected and list(display_names(categories)) == [3, 4, 7]


@pytest.mark.parametrize("lacking", [("annotations",), ("annotations", "categories")])
def test_a_file_without_labels(tmp_path, lacking):
    data = content()
    for key in lacking:
        del data[key]
    file = read(tmp_path, data)
    assert file.annotations == [] and len(file.categories) == 2 - len(lacking)


@pytest.fixture
def folder(tmp_path):
    for name in ("a b.jpg", "sub/é.jpg", "Case.JPG", "x/1.jpg", "50%25.jpg"):
        path = tmp_path / "root" / unicodedata.normalize("NFC", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return str(tmp_path / "root")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("a b.jpg", "a b.jpg"),
        ("a%20b.jpg", "a b.jpg"),
        ("50%25.jpg", "50%25.jpg"),
        ("50%.jpg", "50%25.jpg"),
        ("https://example.org/data/a%20b.jpg?token=1", "a b.jpg"),
        ("C:\\data\\img\\a b.jpg", "a b.jpg"),
        ("\\\\server\\share\\sub\\é.jpg", "sub/é.jpg"),
        ("/home/other/images/sub/é.jpg", "sub/é.jpg"),
        ("../images/case.jpg", "Case.JPG"),
        (unicodedata.normalize("NFD", "sub/é.jpg"), "sub/é.jpg"),
        ("SUB/É.jpg", "sub/é.jpg"),
        # Another image may have that name in a folder that is not named.
        ("1.jpg", None),
        ("y/1.jpg", None),
        ("nothing.jpg", None),
        ("", None),
    ],
)
def test_file_names_of_other_systems(folder, name, path):
    located = locate_files([name], folder)
    assert located.paths.get(name) == path
    assert located.missing == ([] if path else [name])
    assert located.moved == ([name] if path not in (None, name) else [])


def test_ambiguous_file_names_are_not_resolved(folder):
    located = locate_files(["C:\\1\\Case.JPG", "C:\\2\\Case.JPG"], folder)
    assert located.paths == {} and "lead to one file" in located.hint()
    (open(os.path.join(folder, "case.jpg"), "w")).close()
    assert locate_files(["CASE.JPG"], folder).paths == {}
    assert locate_files(["case.jpg", "Case.JPG"], folder).moved == []


def test_hints_at_the_cause_of_missing_files(folder, tmp_path):
    above, inside = str(tmp_path), os.path.join(folder, "sub")
    assert "directory " + os.path.join(folder, "x") in locate_files(["1.jpg"], folder).hint()
    assert folder in locate_files(["a b.jpg"], above).hint()
    assert folder in locate_files(["a b.jpg"], inside).hint()
    assert locate_files(["Case.png"], folder).hint().endswith("Case.JPG has a similar name")
    assert locate_files(["nothing.png"], folder).hint() == ""


def test_loading_follows(tmp_path):
    (tmp_path / "img").mkdir()
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "img" / "a.png")
    data = content(image_id=1.0, iscrowd=False)
    data["images"][0].update(id=1.0, file_name="D:\\img\\a.png")
    data["categories"] = [{"id": 2.0, "name": "cell"}, {"id": 1.0, "name": "cell"}]
    path = tmp_path / "set.json"
    path.write_bytes(json.dumps(data).encode("utf-16"))
    (record,) = load_coco(str(path), str(tmp_path))
    assert record["file_name"] == str(tmp_path / "img" / "a.png")
    assert type(record["image_id"]) is int and len(record["annotations"]) == 1
    assert class_names(str(path)) == ["cell (id 1)", "cell (id 2)"]
    data["images"][0]["file_name"] = "images/v1/IMG/A.png"
    path.write_bytes(json.dumps(data).encode("utf-8-sig"))
    (record,) = load_objects365(str(path), str(tmp_path))
    assert record["file_name"] == str(tmp_path / "img" / "a.png")


@pytest.mark.parametrize(
    ("key", "change", "sentence"),
    [
        ("annotations", {"category_id": "1"}, r"category_id '1', .* not in 'categories' \(1\)"),
        ("annotations", {"image_id": "1"}, r"image id '1', .* not in 'images' \(1\)"),
        ("annotations", {"image_id": [1]}, r"image id \[1\], "),
        ("annotations", {"iscrowd": "0"}, "has iscrowd '0': write 0 or 1"),
        ("images", {"id": 1.5}, r"'images' of .* has the id 1.5: use whole numbers"),
        ("images", {"file_name": 7}, "has the file_name 7: write text"),
        ("images", {"width": "40"}, "has width '40' and height 30"),
        ("categories", {"id": None}, "'categories' of .* has the id None"),
    ],
)
def test_wrong_types_are_named_without_a_preflight(tmp_path, key, change, sentence):
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "a.png")
    data = content()
    data[key][0].update(change)
    (tmp_path / "set.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match=sentence):
        load_coco(str(tmp_path / "set.json"), str(tmp_path), invalid_boxes="skip")


def test_numbers_beside_text_as_ids(tmp_path):
    data = content()
    data["categories"].append({"id": "2", "name": "disc"})
    (tmp_path / "set.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"has the ids 1, '2': use whole numbers"):
        load_coco(str(tmp_path / "set.json"), str(tmp_path))
