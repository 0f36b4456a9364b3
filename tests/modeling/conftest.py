"""A COCO-format set of images that a tiny model can learn by heart."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

from tests.modeling.builders import randomize, tiny_model

COLORS = {"red": (220, 40, 40), "green": (40, 200, 40), "blue": (50, 50, 230)}


@pytest.fixture
def rectangles(tmp_path: Path) -> list[str]:
    """Writes four images with colored rectangles; returns the config's overrides for them."""
    rng = np.random.default_rng(1)
    images, annotations = [], []
    for index in range(4):
        pixels = rng.integers(90, 130, (128, 128, 3), dtype=np.uint8)
        # One rectangle per quadrant, so that none hides another; the first images leave some out.
        for quadrant in range(index % 2, 4):
            width, height = rng.integers(24, 56, 2).tolist()
            x = int(rng.integers(2, 62 - width)) + 64 * (quadrant % 2)
            y = int(rng.integers(2, 62 - height)) + 64 * (quadrant // 2)
            label = int(rng.integers(3))
            pixels[y : y + height, x : x + width] = list(COLORS.values())[label]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": index + 1, "category_id": label + 1}
                | {"bbox": [x, y, width, height], "area": width * height, "iscrowd": 0}
            )
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        images.append({"id": index + 1, "file_name": f"{index}.png", "width": 128, "height": 128})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(COLORS)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "rectangles.json").write_text(json.dumps(content))
    return [
        f"data.train={tmp_path / 'rectangles.json'}",
        f"data.train_images={tmp_path}",
        f"data.val={tmp_path / 'rectangles.json'}",
        f"data.val_images={tmp_path}",
        f"model.num_classes={len(COLORS)}",
        f"train.output_dir={tmp_path / 'out'}",
        "train.effective_batch_size=4",
        "dataloader.train.mapper.augmentations.short_edges=[128]",
        "dataloader.train.mapper.augmentations.crop_probability=0.0",
        "dataloader.train.mapper.augmentations.flip_probability=0.0",
        "dataloader.test.mapper.augmentations.short_edge=128",
    ]


@pytest.fixture(scope="session")
def heads() -> nn.ModuleDict:
    """Six auxiliary heads by name, with random weights."""
    model = tiny_model(6)
    randomize(model)
    return model.auxiliary.heads
