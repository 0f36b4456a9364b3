"""Boxes come back as they were written, in both layouts, and training can read the result."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from co_detr.data.coco import load_coco
from co_detr.data.coco_classes import class_names
from co_detr.data.images import ImageReader
from co_detr.engine.config import load_config
from tests.conversion.folders import CLASSES, TRAIN, VAL, Picture, write_voc, write_yolo

ROOT = Path(__file__).parents[2]
BCCD = ROOT.parent / "shared" / "data" / "bccd"


def expected(pictures: list[Picture]) -> dict[str, list[tuple]]:
    return {p.name: [(CLASSES[label], *box) for label, *box in p.boxes] for p in pictures}


def assert_close(boxes: dict[str, list[tuple]], truth: dict[str, list[tuple]], atol: float) -> None:
    assert boxes.keys() == truth.keys()
    for name in truth:
        assert [box[0] for box in boxes[name]] == [box[0] for box in truth[name]]
        np.testing.assert_allclose(
            [box[1:] for box in boxes[name]], [box[1:] for box in truth[name]], atol=atol
        )


@pytest.mark.parametrize("write", [write_yolo, write_voc])
def test_round_trip(convert, write, tmp_path):
    result = convert(write(tmp_path / "source"), *(["--classes", classes_file(tmp_path)]))
    atol = 1e-9 if write is write_voc else 1e-4
    assert_close(result.boxes("train"), expected(TRAIN), atol)
    assert_close(result.boxes("val"), expected(VAL), atol)
    for split, pictures in (("train", TRAIN), ("val", VAL)):
        content = result.content(split)
        assert [category["name"] for category in content["categories"]] == CLASSES
        sizes = {p.name: p.size for p in pictures}
        for image in content["images"]:
            assert (image["width"], image["height"]) == sizes[Path(image["file_name"]).name]
    assert "no defects found" not in result.printed  # blue occurs in train only
    assert "error" not in result.printed


def classes_file(folder: Path) -> Path:
    path = folder / "names.txt"
    path.write_text("\n".join(CLASSES))
    return path


@pytest.mark.parametrize("write", [write_yolo, write_voc])
def test_the_printed_command_reads_the_boxes_where_they_are_in_the_image(convert, write, tmp_path):
    # A name that neither the shell nor the overrides take as it is.
    source = write(tmp_path / "my 'set', no. 1")
    result = convert(source, "--classes", classes_file(tmp_path))
    command = result.printed[result.printed.index("python train_net.py") :]
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == ["python", "train_net.py", "--config-file"]
    cfg = load_config(words[3], words[4:])
    for split, pictures in (("train", TRAIN), ("val", VAL)):
        records = load_coco(cfg.data[split], cfg.data[f"{split}_images"])
        assert class_names(cfg.data[split]) == CLASSES
        assert len(records) == len(pictures)
        for record in records:
            rgb = ImageReader().read_rgb(record["file_name"])
            assert rgb.shape[:2] == (record["height"], record["width"])
            for annotation in record["annotations"]:
                x, y, width, height = (round(value) for value in annotation["bbox"])
                inside = rgb[y : y + height, x : x + width]
                assert inside.mean() > 200, record["file_name"]


@pytest.mark.skipif(not BCCD.is_dir(), reason="the blood cells are not there")
@pytest.mark.parametrize("layout", ["yolo", "voc"])
def test_blood_cells(convert, tmp_path, layout):
    truth = json.loads((BCCD / "val.json").read_text())
    names = {category["id"]: category["name"] for category in truth["categories"]}
    sets = {"train": truth["images"][:8], "val": truth["images"][8:12]}
    boxes: dict[str, list[tuple]] = {}
    source = tmp_path / "source"
    for split, images in sets.items():
        for image in images:
            mine = [
                annotation
                for annotation in truth["annotations"]
                if annotation["image_id"] == image["id"]
            ]
            boxes[image["file_name"]] = [
                (names[annotation["category_id"]], *annotation["bbox"]) for annotation in mine
            ]
            write_blood_cells(source, layout, split, image, boxes[image["file_name"]])
    if layout == "yolo":
        (source / "classes.txt").write_text("\n".join(names.values()))
    result = convert(source)
    for split, images in sets.items():
        mine = {image["file_name"]: boxes[image["file_name"]] for image in images}
        assert sum(map(len, mine.values())) > 20
        assert_close(result.boxes(split), mine, atol=1)
        assert f"{split}: {len(images)} images" in result.printed


def write_blood_cells(
    root: Path, layout: str, split: str, image: dict, boxes: list[tuple[str, ...]]
) -> None:
    stem, width, height = Path(image["file_name"]).stem, image["width"], image["height"]
    if layout == "yolo":
        picture, label = root / "images" / split, root / "labels" / split / f"{stem}.txt"
        order = ["RBC", "WBC", "Platelets"]
        lines = [
            f"{order.index(n)} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} "
            f"{h / height}\n"
            for n, x, y, w, h in boxes
        ]
    else:
        picture, label = root / "JPEGImages", root / "Annotations" / f"{stem}.xml"
        objects = [
            f"<object><name>{n}</name><bndbox><xmin>{round(x) + 1}</xmin><ymin>{round(y) + 1}"
            f"</ymin><xmax>{round(x + w)}</xmax><ymax>{round(y + h)}</ymax></bndbox></object>"
            for n, x, y, w, h in boxes
        ]
        lines = ["<annotation>", *objects, "</annotation>"]
        main = root / "ImageSets" / "Main"
        main.mkdir(parents=True, exist_ok=True)
        with (main / f"{split}.txt").open("a") as listing:
            listing.write(f"{stem}\n")
    picture.mkdir(parents=True, exist_ok=True)
    label.parent.mkdir(parents=True, exist_ok=True)
    (picture / image["file_name"]).symlink_to(BCCD / "images" / image["file_name"])
    label.write_text("".join(lines))
