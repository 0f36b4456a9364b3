"""A fabricated run for the tests of the plots."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def make_run() -> Callable[..., None]:
    """`make_run(folder, parts=("matching", "roi"))` writes an output folder and its data set."""
    return write_run


def write_run(folder: Path, parts: tuple[str, ...] = ("matching", "roi")) -> None:
    """A complete output folder with its data set beside it."""
    images = folder / "images"
    images.mkdir(parents=True)
    records = []
    for iteration in range(0, 100, 10):
        losses = {f"{part}.loss_cls": 2.0 / (iteration + 1) for part in parts}
        records.append({"iteration": iteration, "total_loss": sum(losses.values()), **losses})
    records.append({"iteration": 99, "bbox/AP": 31.0, "bbox/AP50": 62.0})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)
    for name in ("a.png", "b.png"):
        Image.fromarray(np.full((60, 80, 3), 200, np.uint8)).save(images / name)
    coco = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 7, "file_name": "b.png"}],
        "annotations": [{"image_id": 1, "category_id": 4, "bbox": [10, 12, 20, 30]}],
        "categories": [{"id": 4, "name": "four"}, {"id": 9, "name": "nine"}],
    }
    (folder / "val.json").write_text(json.dumps(coco))
    results = [
        {"image_id": 1, "category_id": 9, "bbox": [11, 12, 20, 30], "score": 0.9},
        {"image_id": 1, "category_id": 4, "bbox": [11, 12, 20, 30], "score": 0.1},
    ]
    (folder / "coco_instances_results.json").write_text(json.dumps(results))
    # Saved configs may hold Python objects, which must not get in the way (nor be run).
    (folder / "config.yaml").write_text(
        f"data: {{val: '{folder}/val.json', val_images: '{images}'}}\n"
        "model: {sizes: !!python/tuple [1, 2], dtype: !!python/object/apply:os.abort []}\n"
    )
