"""VOC: what the format leaves open, encodings, and files that are wrong."""

import shutil
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_utils
import pytest
from PIL import Image

from co_detr.data.images import ImageReader
from co_detr.errors import ConfigError, DataError
from co_detr.tools.convert.dataset import ImageSize, read_size
from co_detr.tools.convert.voc import VocRules, read_voc_labels
from tests.conversion.folders import TRAIN, VAL, Picture, write_voc

BOX = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>10</xmax><ymax>20</ymax></bndbox>"
SIZE = ImageSize(40, 30)


def xml(objects: str, size: str = "") -> str:
    return f"<annotation>{size}{objects}</annotation>"


def read(tmp_path: Path, text: str | bytes, size: ImageSize = SIZE, **rules):
    path = tmp_path / "a.xml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_voc_labels(path, size, VocRules(**rules))


def test_pixels_are_counted_from_1_and_the_last_one_is_inside(tmp_path):
    text = xml(f"<object><name>cat</name>{BOX}</object>")
    assert read(tmp_path, text).boxes[0].xyxy == (0, 1, 10, 20)
    assert read(tmp_path, text, zero_based=True).boxes[0].xyxy == (1, 2, 10, 20)
    # The whole image, as VOC writes it and as others do.
    whole = text.replace(BOX, BOX.replace(">2<", ">1<").replace(">10<", ">40<"))
    whole = whole.replace(">20<", ">30<")
    assert read(tmp_path, whole).boxes[0].xyxy == (0, 0, 40, 30)
    zero = whole.replace(">1<", ">0<")
    assert read(tmp_path, zero, zero_based=True).boxes[0].xyxy == (0, 0, 40, 30)
    assert read(tmp_path, zero, zero_based=True).remarks == []
    (remark,) = read(tmp_path, zero).remarks
    assert "pixel 0" in remark.what and "--zero-based" in remark.remedy
    floats = text.replace(">10<", ">10.0000012<")
    assert read(tmp_path, floats).boxes[0].xyxy[2] == pytest.approx(10)


def test_difficult_objects_are_crowd_regions_unless_kept(convert, tmp_path):
    source = write_voc(tmp_path / "voc")
    label = source / "Annotations" / "a.xml"
    label.write_text(TRAIN[0].voc(difficult=1))
    result = convert(source)
    assert [annotation["iscrowd"] for annotation in result.content("train")["annotations"]] == [
        1,
        1,
        0,
        0,
    ]
    assert "4 images, 2 boxes, 2 crowd regions" in result.printed
    assert "images with objects marked as difficult: 1" in result.printed
    result = convert(source, "--keep-difficult", "--force")
    assert {annotation["iscrowd"] for annotation in result.content("train")["annotations"]} == {0}


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_of_stored_pixels_are_turned_with_them(tmp_path, orientation):
    stored = np.zeros((30, 40, 3), dtype=np.uint8)
    stored[2:12, 5:20] = 255
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    size = read_size(tmp_path / "a.png")
    assert size == ImageSize(30, 40, orientation)
    box = BOX.replace(">1<", ">6<").replace(">2<", ">3<").replace(">10<", ">20<")
    objects = f"<object><name>cat</name>{box.replace('<ymax>20<', '<ymax>12<')}</object>"
    stated = "<size><width>{}</width><height>{}</height></size>"
    labels = read(tmp_path, xml(objects, stated.format(40, 30)), size)
    x0, y0, x1, y1 = map(round, labels.boxes[0].xyxy)
    upright = ImageReader().read_rgb(tmp_path / "a.png")
    assert upright.shape == (40, 30, 3)
    assert upright[y0:y1, x0:x1].min() == 255 and upright.sum() == stored.sum() == 255 * 3 * 150
    assert "EXIF" in labels.remarks[0].what
    # With the size of the upright image, the boxes are those of the upright image.
    assert read(tmp_path, xml(objects, stated.format(30, 40)), size).boxes[0].xyxy == (5, 2, 20, 12)
    for free in ("", stated.format(0, 0), stated.format("", "")):
        assert read(tmp_path, xml(objects, free), size).boxes[0].xyxy == (5, 2, 20, 12)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (xml("<object><name>a</name>"), "a.xml is not valid xml"),
        ("", "a.xml is not valid xml"),
        (xml(f"<object>{BOX}</object>"), "a.xml object 1 has no name"),
        (xml("<object><name>a</name></object>"), "object 1 has no number as bndbox/xmin"),
        (
            xml(f"<object><name>a</name>{BOX.replace('10', 'ten')}</object>"),
            r"has no number as bndbox/xmax \(ten\)",
        ),
        (
            xml(f"<object><name>a</name>{BOX.replace('10', 'inf')}</object>"),
            r"has no number as bndbox/xmax \(inf\)",
        ),
        (
            xml(f"<object><name>a</name><difficult>x</difficult>{BOX}</object>"),
            "has difficult x: write 0 or 1",
        ),
        (
            xml("", "<size><width>30</width><height>40</height></size>"),
            "a.xml is about an image of 30x40 pixels, but its image has 40x30",
        ),
        (
            xml("<object><name>café</name></object>").encode("latin-1"),
            "because of its encoding: save it as UTF-8, or state",
        ),
        (
            b'<?xml version="1.0" encoding="gb18030"?>' + xml("猫").encode("gb18030"),
            "because of its encoding: save it as UTF-8",
        ),
    ],
)
def test_wrong_files_are_named(tmp_path, text, sentence):
    with pytest.raises(DataError, match=sentence) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "latin-1", "windows-1252"])
def test_stated_encodings(tmp_path, encoding):
    text = f'<?xml version="1.0" encoding="{encoding}"?>'
    text += xml(f"<object><name> café </name>{BOX}</object>")
    assert read(tmp_path, text.encode(encoding)).boxes[0].class_name == "café"


def in_folders(source: Path) -> None:
    for split, pictures in (("train", TRAIN), ("valid", VAL)):
        (source / split).mkdir()
        for picture in pictures:
            (source / "JPEGImages" / picture.name).rename(source / split / picture.name)
            label = f"{picture.stem}.xml"
            (source / "Annotations" / label).rename(source / split / label)
    for name in ("JPEGImages", "Annotations", "ImageSets"):
        shutil.rmtree(source / name)


def with_columns(source: Path) -> None:
    for path in (source / "ImageSets" / "Main").iterdir():
        lines = path.read_text().split()
        path.write_text("".join(f"{line}  {number - 1}\n" for number, line in enumerate(lines[:3])))
        path.open("a").writelines(f"{line}.jpg\n" for line in lines[3:])


@pytest.mark.parametrize("change", [in_folders, with_columns])
def test_layouts(convert, tmp_path, change):
    expected = convert(write_voc(tmp_path / "plain"))
    source = write_voc(tmp_path / "changed")
    change(source)
    result = convert(source, "--force")
    for split in ("train", "val"):
        assert result.boxes(split) == expected.boxes(split)
    names = [category["name"] for category in result.content("val")["categories"]]
    assert names == ["blue", "green", "red"]  # sorted: the format has no order


def test_optional_lists(convert, tmp_path):
    source = write_voc(tmp_path / "voc")
    lists = source / "ImageSets" / "Main"
    (lists / "test.txt").write_text("gone\n")
    result = convert(source)
    assert "note: the test set is left out: " in result.printed
    assert "test.txt line 1 names gone, but there is no image" in result.printed
    assert not (result.folder / "test.json").exists()
    # Test images without labels are a set, too.
    (source / "Annotations" / "c.xml").rename(source / "c.xml")
    (lists / "test.txt").write_text("c\n")
    (lists / "val.txt").write_text("gone\n")
    with pytest.raises(DataError, match=r"names gone, .* or add --val-fraction 0\.2"):
        convert(source, "--force")
    result = convert(source, "--val-fraction", "0.5", "--force")
    assert "note: the val set is left out: " in result.printed
    assert result.boxes("test") == {"c.webp": []} and len(result.boxes("val")) == 2


def test_missing_files(convert, tmp_path):
    source = write_voc(tmp_path / "voc")
    (source / "Annotations" / "b.xml").unlink()
    (source / "Annotations" / "gone.xml").write_text(xml(""))
    result = convert(source)
    assert result.boxes("train")["b.PNG"] == []
    assert "images without a label file: 1 (the first: " in result.printed
    assert "label files without an image: 1 (the first: " in result.printed
    (source / "JPEGImages" / "b.PNG").rename(source / "b.PNG")
    with pytest.raises(DataError, match="train.txt line 2 names b, but there is no image"):
        convert(source, "--force")
    (source / "b.PNG").rename(source / "JPEGImages" / "b.PNG")
    Picture("a.png", (80, 60)).write(source / "JPEGImages")
    with pytest.raises(DataError, match="a could be a.jpg and a.png in"):
        convert(source, "--force")


def test_arguments(convert, tmp_path):
    source = write_voc(tmp_path / "voc", lists=False)
    with pytest.raises(ConfigError, match="has no val set"):
        convert(source)
    # Empty images only are no val set: the preflight of the result says so.
    for picture in TRAIN + VAL:
        (source / "Annotations" / f"{picture.stem}.xml").write_text(xml(""))
    with pytest.raises(DataError, match="empty list of categories"):
        convert(source, "--val-fraction", "0.4")
    with pytest.raises(ConfigError, match="train.json exists: choose another --output, or add --f"):
        convert(source, "--val-fraction", "0.4")
    names = tmp_path / "names.txt"
    names.write_text("red\n")
    source = write_voc(tmp_path / "other")
    with pytest.raises(DataError, match=r"has the class blue, which is none of red: correct it"):
        convert(source, "--classes", names, "--force")
    with pytest.raises(DataError, match="nowhere does not exist"):
        convert(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="names.txt is no folder"):
        convert(names, "--format", "voc")
    with pytest.raises(ConfigError, match="are about VOC"):
        convert(source, "--format", "yolo", "--zero-based")


# Masks.


def write_masks(root, number_of=lambda index: index + 1, border=True):
    """SegmentationObject of a.jpg, whose second object fills the image, and of b.PNG."""
    folder = root / "SegmentationObject"
    folder.mkdir()
    for picture in TRAIN[:2]:
        numbers = np.zeros((picture.size[1], picture.size[0]), np.uint8)
        for index, (_, x, y, w, h) in reversed(list(enumerate(picture.boxes))):
            if border:
                numbers[y : y + h, x : x + w] = 255
            numbers[y + 1 : y + h - 1, x + 1 : x + w - 1] = number_of(index)
        image = Image.fromarray(numbers).convert("P")
        image.save(folder / f"{picture.stem}.png")
    return root


def by_image(result):
    content = result.content("train")
    names = {image["id"]: Path(image["file_name"]).name for image in content["images"]}
    found = {}
    for entry in content["annotations"]:
        mask = entry.get("segmentation")
        area = None if mask is None else int(mask_utils.area(mask))
        found.setdefault(names[entry["image_id"]], []).append(area)
    return found


@pytest.mark.parametrize("number_of", [lambda index: index + 1, lambda index: 7 - index])
def test_masks_of_objects(convert, tmp_path, number_of):
    """By their numbers, or where these are others, by their boxes."""
    result = convert(write_masks(write_voc(tmp_path / "voc"), number_of))
    # The rim of each object is VOC's border; the second one of a.jpg is seen around the first.
    areas = by_image(result)
    assert areas["a.jpg"] == [28 * 13, 78 * 58 - 30 * 15]
    assert areas["b.PNG"] == [4 * 58]
    assert areas["phone.jpg"] == [None]
    assert "3      " in result.printed and "objects without a mask" in result.printed


def test_masks_that_fit_no_box_are_left_out(convert, tmp_path):
    source = write_masks(write_voc(tmp_path / "voc"))
    numbers = np.zeros((70, 50), np.uint8)
    numbers[:20, :20] = 1
    Image.fromarray(numbers).save(source / "SegmentationObject" / "b.png")
    result = convert(source)
    assert by_image(result)["b.PNG"] == [None]
    assert "images with masks that fit no box" in result.printed


@pytest.mark.parametrize(
    ("pixels", "sentence"),
    [
        (np.zeros((70, 51), np.uint8), r"b\.png has 51x70 pixels, but its image has 50x70"),
        (np.zeros((70, 50, 3), np.uint8), r"b\.png has colors \(mode RGB\) instead of numbers"),
    ],
)
def test_mask_files_that_are_wrong(convert, tmp_path, pixels, sentence):
    source = write_masks(write_voc(tmp_path / "voc"))
    Image.fromarray(pixels).save(source / "SegmentationObject" / "b.png")
    with pytest.raises(DataError, match=sentence):
        convert(source)
