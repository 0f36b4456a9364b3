"""YOLO: the places where labels and images can lie, and lines that are odd or wrong."""

import shutil
from pathlib import Path

import pytest

from co_detr.data.coco import load_coco
from co_detr.errors import ConfigError, DataError
from co_detr.tools.convert.dataset import ImageSize
from co_detr.tools.convert.yolo import read_yolo_labels
from tests.conversion.folders import CLASSES, TRAIN, VAL, write_yolo

NAMES = {p.name for p in TRAIN}


def read(tmp_path: Path, text: str | bytes, **options):
    path = tmp_path / "a.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    boxes = read_yolo_labels(path, ImageSize(200, 100), CLASSES, **options).boxes
    return [(box.class_name, *(round(value, 6) for value in box.xyxy)) for box in boxes]


def test_lines(tmp_path):
    assert read(tmp_path, "") == read(tmp_path, "\n  \n") == []
    assert read(tmp_path, "1 0.5 0.5 0.2 0.4\r\n") == [("green", 80, 30, 120, 70)]
    assert read(tmp_path, b"\xef\xbb\xbf2.0\t0.5 0.5 1 1") == [("blue", 0, 0, 200, 100)]
    # A polygon of three points, an oriented box, and a box with two keypoints.
    assert read(tmp_path, "0 0.1 0.2 0.5 0.9 0.3 0.1") == [("red", 20, 10, 100, 90)]
    assert read(tmp_path, "0 .1 .5 .2 .1 .9 .5 .8 .9") == [("red", 20, 10, 180, 90)]
    line = "0 0.5 0.5 0.2 0.4 0.1 0.1 2 0 0 0"
    assert read(tmp_path, line, keypoints=True) == [("red", 80, 30, 120, 70)]


def masks_of(convert, tmp_path, lines):
    source = write_yolo(tmp_path / "yolo")
    for name, text in lines.items():
        (source / "labels" / "train" / f"{name}.txt").write_text(text)
    result = convert(source)
    found = [entry.get("segmentation") for entry in result.content("train")["annotations"]]
    return found, result


def test_polygons_are_masks(convert, tmp_path):
    lines = {
        "a": "0 0.1 0.2 0.5 0.9 0.3 0.1\n1 0.5 0.5 0.2 0.4\n",  # of 80x60
        "b": "1 .1 .1 .9 .1 .9 .9 .1 .9",  # of 50x70
    }
    masks, result = masks_of(convert, tmp_path, lines)
    assert [8, 12, 40, 54, 24, 6] in (mask[0] for mask in masks if mask)
    assert [5, 7, 45, 7, 45, 63, 5, 63] in (mask[0] for mask in masks if mask)
    assert masks.count(None) == len(masks) - 2
    assert "objects without a mask" in result.printed
    records = load_coco(
        str(result.folder / "train.json"), str(tmp_path / "yolo/images/train"), with_masks=True
    )
    kept = [one for record in records for one in record["annotations"] if "segmentation" in one]
    assert len(kept) == 2


def test_oriented_boxes_are_no_masks(convert, tmp_path):
    masks, result = masks_of(convert, tmp_path, {"a": "0 .1 .5 .2 .1 .9 .5 .8 .9"})
    assert set(masks) == {None}
    assert "taken as oriented boxes, which are no masks" in result.printed


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("0 0.5 0.5 0.1 0.1\n3 0.5 0.5 1 1", r"a.txt line 2 has class 3, but .* 0 to 2 \(red, gr"),
        ("-1 0.5 0.5 1 1", "line 1 has class -1"),
        ("0.5 0.5 0.5 1 1", "line 1 has class 0.5"),
        ("0 0.5 0.5 1", "has 3 numbers behind the class: write four"),
        ("0 0.5 0.5 1 1 0.9", "the last one is a confidence, remove it"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "has 7 numbers behind the class"),
        ("0 100 50 20 20", "has 100, which is not from 0 to 1: divide"),
        ("0 0.1 0.2 0.5 1.9 0.3 0.1", "has 1.9, which is not from 0 to 1"),
        ("0 0.5 nan 1 1", "has nan, which is no finite number"),
        ("red 0.5 0.5 1 1", "has 'red', which is no number"),
        (b"0 0.5 0.5 1 1 # caf\xe9", "a.txt is not UTF-8"),
    ],
)
def test_wrong_lines_are_named(tmp_path, text, sentence):
    with pytest.raises(DataError, match=sentence):
        read(tmp_path, text)


def test_boxes_slightly_outside_are_clipped(convert, tmp_path):
    source = write_yolo(tmp_path / "yolo")
    label = source / "labels" / "val" / "c.txt"  # of 64x48
    label.write_text("0 0.5 0.5 1.05 1.002\n1 0.5 0.5 0 0.1\n2 1.05 0.5 0.05 0.5\n")
    result = convert(source)
    assert result.boxes("val") == {"c.webp": [("red", 0, 0, 64, 48)]}
    assert "boxes that are partly outside their image: 1 (the first: annotation 1" in result.printed
    assert "boxes that have no area: 1" in result.printed
    assert "boxes that are outside their image: 1" in result.printed


def roboflow(source: Path) -> None:
    for old, new in (("train", "train"), ("val", "valid")):
        for kind in ("images", "labels"):
            (source / new).mkdir(exist_ok=True)
            (source / kind / old).rename(source / new / kind)
    names = ", ".join(CLASSES)
    (source / "data.yaml").write_text(
        f"train: ../train/images\nval: ../valid/images\nnc: 3\nnames: [{names}]\n"
    )


def without_yaml(source: Path) -> None:
    (source / "data.yaml").unlink()
    (source / "classes.txt").write_text("\n".join(CLASSES))


def roboflow_without_yaml(source: Path) -> None:
    roboflow(source)
    without_yaml(source)


def listed(source: Path) -> None:
    """One folder of images, with lists in three of the usual notations."""
    for split, start in (("train", "./images"), ("val", f"{source.name}/images")):
        paths = sorted((source / "images" / split).iterdir())
        lines = [f"{start}/{path.name}" for path in paths]
        (source / f"{split}.txt").write_text("\n".join(lines) + "\n\n")
        for kind in ("images", "labels"):
            for path in list((source / kind / split).iterdir()):
                path.rename(source / kind / path.name)
            (source / kind / split).rmdir()
    text = (source / "data.yaml").read_text()
    for split in ("train", "val"):
        text = text.replace(f"images/{split}", f"{split}.txt")
    (source / "data.yaml").write_text("path: /on/another/machine\n" + text)


def listed_without_yaml(source: Path) -> None:
    listed(source)
    without_yaml(source)


def labels_beside_images(source: Path) -> None:
    for split in ("train", "val"):
        for path in list((source / "labels" / split).iterdir()):
            path.rename(source / "images" / split / path.name)
    shutil.rmtree(source / "labels")


@pytest.mark.parametrize(
    "change",
    [
        without_yaml,
        roboflow,
        roboflow_without_yaml,
        listed,
        listed_without_yaml,
        labels_beside_images,
    ],
)
def test_layouts(convert, tmp_path, change):
    expected = convert(write_yolo(tmp_path / "plain"))
    source = write_yolo(tmp_path / "changed")
    change(source)
    result = convert(source, "--force")
    for split, pictures in (("train", TRAIN), ("val", VAL)):
        boxes = result.boxes(split)
        assert boxes.keys() == {p.name for p in pictures}
        assert boxes == expected.boxes(split)
    assert sum(map(len, result.boxes("train").values())) == 4


def test_a_test_set_is_written_too(convert, tmp_path):
    source = write_yolo(tmp_path / "yolo")
    for kind in ("images", "labels"):
        shutil.copytree(source / kind / "val", source / kind / "test")
    with (source / "data.yaml").open("a") as file:
        file.write("test: images/test\n")
    result = convert(source / "data.yaml")
    assert result.boxes("test") == result.boxes("val")


def _names_no_test_folder(source: Path) -> None:
    with (source / "data.yaml").open("a") as file:
        file.write("test: images/test\n")


def _empty_test_folder(source: Path) -> None:
    (source / "images" / "test").mkdir()
    _names_no_test_folder(source)


def _list_of_missing_test_images(source: Path) -> None:
    (source / "test.txt").write_text("images/test/a.jpg\n")
    with (source / "data.yaml").open("a") as file:
        file.write("test: test.txt\n")


def _empty_test_folder_without_yaml(source: Path) -> None:
    without_yaml(source)
    (source / "images" / "test").mkdir()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_names_no_test_folder, "names images/test, which is not in"),
        (_empty_test_folder, "the test set has no image"),
        (_list_of_missing_test_images, "line 1 names images/test/a.jpg, which is not in"),
        (_empty_test_folder_without_yaml, "the test set has no image"),
    ],
)
def test_a_wrong_test_set_is_left_out_with_a_note(convert, tmp_path, change, sentence):
    source = write_yolo(tmp_path / "yolo")
    change(source)
    result = convert(source)
    assert "note: the test set is left out: " in result.printed and sentence in result.printed
    assert not (result.folder / "test.json").exists()
    assert result.boxes("train").keys() == NAMES and "Train on it with" in result.printed


def test_a_test_set_without_labels_is_written(convert, tmp_path):
    source = write_yolo(tmp_path / "yolo")
    shutil.copytree(source / "images" / "val", source / "images" / "test")
    _names_no_test_folder(source)
    result = convert(source)
    assert result.boxes("test") == {"c.webp": []}
    assert "images without a label file: 1 (the first: " in result.printed


def test_a_val_set_that_is_not_there(convert, tmp_path):
    source = write_yolo(tmp_path / "yolo")
    shutil.rmtree(source / "images" / "val")
    with pytest.raises(DataError, match=r"names images/val, .* or add --val-fraction 0\.2 to draw"):
        convert(source)
    result = convert(source, "--val-fraction", "0.5")
    assert "note: the val set is left out: " in result.printed
    assert result.boxes("train").keys() | result.boxes("val").keys() == NAMES


@pytest.mark.parametrize(
    "start", ["..\\", "D:\\work\\yolo\\", "/content/yolo/", "/kaggle/input/x/yolo/"]
)
def test_paths_of_other_machines(convert, tmp_path, start):
    expected = convert(write_yolo(tmp_path / "plain"))
    source = write_yolo(tmp_path / "changed")
    names = sorted((source / "images" / "train").iterdir())
    separator = "\\" if "\\" in start else "/"
    lines = [separator.join(["images", "train", path.name]) for path in names]
    (source / "list.txt").write_text("\n".join(start + line for line in lines))
    (source / "data.yaml").write_text(
        f"train: {start}list.txt\nval: {start}images{separator}val\nnames: [{', '.join(CLASSES)}]\n"
    )
    result = convert(source, "--force")
    for split in ("train", "val"):
        assert result.boxes(split) == expected.boxes(split)


def test_the_folder_of_all_images_is_no_test_set(convert, tmp_path):
    source = write_yolo(tmp_path / "yolo")
    with (source / "data.yaml").open("a") as file:
        file.write("test: ../test/images\n")
    assert "the test set is left out" in convert(source).printed


def test_files_in_utf_16(convert, tmp_path):
    source = write_yolo(tmp_path / "yolo", yaml=False)
    (source / "classes.txt").write_text("\n".join(CLASSES), encoding="utf-16")
    assert convert(source).boxes("train").keys() == NAMES


def test_missing_and_superfluous_label_files(convert, tmp_path):
    source = write_yolo(tmp_path / "yolo")
    (source / "labels" / "train" / "b.txt").unlink()
    (source / "labels" / "train" / "gone.txt").write_text("0 0.5 0.5 1 1\n")
    (source / "labels" / "train" / "classes.txt").write_text("red\n")
    result = convert(source)
    boxes = result.boxes("train")
    assert boxes["b.PNG"] == boxes["empty.bmp"] == [] and boxes.keys() == NAMES
    assert "images without a label file: 1 (the first: " in result.printed
    assert "label files without an image: 1 (the first: " in result.printed
    shutil.rmtree(source / "labels" / "train")
    with pytest.raises(DataError, match="none of the 4 train images has a label file"):
        convert(source, "--force")


def test_a_val_set_is_drawn_from_train(convert, tmp_path):
    source = write_yolo(tmp_path / "yolo", yaml=False)
    for kind in ("images", "labels"):
        shutil.rmtree(source / kind / "val")
    with pytest.raises(ConfigError, match="has no val set: add --val-fraction 0.2"):
        convert(source)
    result = convert(source, "--val-fraction", "0.5")
    train, val = result.boxes("train"), result.boxes("val")
    assert len(train) == len(val) == 2 and train.keys() | val.keys() == NAMES
    again = convert(source, "--val-fraction", "0.5", "--force")
    assert again.boxes("val") == val
    for part in ("0", "1", "-3", "0.01", "nan"):
        with pytest.raises(ConfigError, match="leaves a set empty"):
            convert(source, f"--val-fraction={part}", "--force")


def test_the_current_folder(convert, tmp_path, monkeypatch):
    source = write_yolo(tmp_path / "yolo")
    labels_beside_images(source)
    (source / "classes.txt").write_text("\n".join(CLASSES))
    (source / "classes.txt").rename(source / "images" / "train" / "classes.txt")
    monkeypatch.chdir(source / "images" / "train")
    result = convert(Path("."), "--val-fraction", "0.5")
    assert result.boxes("train").keys() | result.boxes("val").keys() == NAMES
    assert "data.train_images=" in result.printed  # behind the preflight, which found the files


def test_all_wrong_files_are_counted(convert, tmp_path):
    source = write_yolo(tmp_path / "yolo")
    (source / "labels" / "train" / "a.txt").write_text("7 0.5 0.5 1 1\n")
    (source / "images" / "train" / "b.PNG").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"line 1 has class 7.*\(The first of 2 wrong files.\)$"):
        convert(source)
    (source / "labels" / "train" / "a.txt").write_text("")
    with pytest.raises(DataError, match="image .*b.PNG cannot be decoded .*: replace the file"):
        convert(source)
    assert not (tmp_path / "coco").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("names: [a, b]\nnc: 3\ntrain: images/train", "has nc: 3 but 2 names"),
        ("names: [a, a]\ntrain: images/train", "has the class a twice"),
        ("names: {1: a, 2: b}\ntrain: images/train", "numbers its names not from 0 on"),
        ("names: []\ntrain: images/train", "names no classes"),
        ("names: a\ntrain: images/train", "names that are no list"),
        ("train: images/train", "does not say the names of the classes"),
        ("names: [a]\ntrain: nowhere\n", "data.yaml names nowhere, which is not in"),
        ("names: [a]\nval: images/val\n", "has no train set"),
        ("names: [a\n", "data.yaml is not valid yaml"),
        ("- a\n", "data.yaml has no keys"),
    ],
)
def test_wrong_yaml_files_are_explained(convert, tmp_path, text, sentence):
    source = write_yolo(tmp_path / "yolo")
    (source / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=sentence) as caught:
        convert(source)
    assert "\n" not in str(caught.value)


def test_several_yaml_files(convert, tmp_path):
    source = write_yolo(tmp_path / "yolo")
    (source / "data.yaml").rename(source / "mine.yaml")
    assert convert(source).boxes("train").keys() == NAMES
    shutil.copy(source / "mine.yaml", source / "other.yml")
    with pytest.raises(DataError, match=r"several yaml files \(mine.yaml, other.yml\)"):
        convert(source, "--force")
