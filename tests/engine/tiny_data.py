"""A tiny COCO-format data set."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass
class TinyData:
    """Paths of a data set that a test may edit."""

    root: Path

    @property
    def train(self) -> Path:
        return self.root / "train.json"

    @property
    def images(self) -> Path:
        return self.root / "images"

    def overrides(self, output_dir: Path | str) -> list[str]:
        return [
            f"data.train={self.train}",
            f"data.train_images={self.images}",
            f"data.val={self.root / 'val.json'}",
            f"data.val_images={self.images}",
            f"train.output_dir={output_dir}",
        ]


def make_tiny_data(root: Path) -> TinyData:
    """Ten images of two shapes, some without boxes; train and val are the same."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    images, annotations = [], []
    for i in range(10):
        width, height = (64, 48) if i % 3 else (48, 64)
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")
        images.append({"id": i + 1, "file_name": f"{i}.png", "width": width, "height": height})
        for j in range(i % 3):  # some images are empty
            box = [4 + 6 * j, 5 + 3 * i, 20, 12]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": i + 1, "category_id": 3 + 4 * j}
                | {"bbox": box, "area": 240, "iscrowd": 0}
            )
    categories = [{"id": 3, "name": "cell"}, {"id": 7, "name": "plate"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    for name in ("train.json", "val.json"):
        (root / name).write_text(json.dumps(content))
    return TinyData(root)
