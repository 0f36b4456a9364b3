"""Writes data sets in YOLO and VOC layout from boxes in pixels."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ["red", "green", "blue"]
SIDEWAYS = 6  # EXIF orientation of a phone held upright


@dataclass(frozen=True)
class Picture:
    """An image to write.

    Attributes:
        name: with suffix.
        size: (width, height) of the upright image.
        boxes: (class index, x, y, width, height) in whole pixels of it.
    """

    name: str
    size: tuple[int, int]
    boxes: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    orientation: int = 1

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    def write(self, folder: Path) -> None:
        """Draws each box in white, so that a test can see where it is."""
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((self.size[1], self.size[0], 3), dtype=np.uint8)
        for _, x, y, width, height in self.boxes:
            pixels[y : y + height, x : x + width] = 255
        image = Image.fromarray(pixels)
        exif = Image.Exif()
        if self.orientation == SIDEWAYS:  # is turned clockwise to be seen
            image = image.transpose(Image.Transpose.ROTATE_90)
            exif[274] = SIDEWAYS
        image.save(folder / self.name, exif=exif)

    def yolo(self) -> str:
        width, height = self.size
        return "".join(
            f"{label} {(x + w / 2) / width:.6f} {(y + h / 2) / height:.6f} {w / width:.6f} "
            f"{h / height:.6f}\n"
            for label, x, y, w, h in self.boxes
        )

    def voc(self, difficult: int = 0) -> str:
        objects = "".join(
            f"<object><name>{CLASSES[label]}</name><difficult>{difficult}</difficult><bndbox>"
            f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
            "</bndbox><part><name>head</name></part></object>"
            for label, x, y, w, h in self.boxes
        )
        size = f"<width>{self.size[0]}</width><height>{self.size[1]}</height><depth>3</depth>"
        return f"<annotation><size>{size}</size>{objects}</annotation>"


TRAIN = [
    Picture("a.jpg", (80, 60), [(0, 10, 20, 30, 15), (2, 0, 0, 80, 60)]),
    Picture("b.PNG", (50, 70), [(1, 44, 3, 6, 60)]),
    Picture("phone.jpg", (40, 90), [(0, 5, 10, 20, 60)], SIDEWAYS),
    Picture("empty.bmp", (33, 44)),
]
VAL = [Picture("c.webp", (64, 48), [(1, 8, 8, 16, 16)])]


def write_yolo(root: Path, yaml: bool = True) -> Path:
    """images/{train,val}, labels/{train,val}, and data.yaml or classes.txt."""
    for split, pictures in {"train": TRAIN, "val": VAL}.items():
        labels = root / "labels" / split
        labels.mkdir(parents=True)
        for picture in pictures:
            picture.write(root / "images" / split)
            (labels / f"{picture.stem}.txt").write_text(picture.yolo())
    if yaml:
        names = "".join(f"  {i}: {name}\n" for i, name in enumerate(CLASSES))
        text = f"train: images/train\nval: images/val\nnames:\n{names}"
        (root / "data.yaml").write_text(text)
    else:
        (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def write_voc(root: Path, lists: bool = True) -> Path:
    """JPEGImages, Annotations and, if asked for, ImageSets/Main."""
    annotations, main = root / "Annotations", root / "ImageSets" / "Main"
    annotations.mkdir(parents=True)
    main.mkdir(parents=True)
    for split, pictures in {"train": TRAIN, "val": VAL}.items():
        for picture in pictures:
            picture.write(root / "JPEGImages")
            (annotations / f"{picture.stem}.xml").write_text(picture.voc())
        if lists:
            (main / f"{split}.txt").write_text("".join(f"{p.stem}\n" for p in pictures))
    return root
