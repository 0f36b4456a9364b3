"""tools/inspect_data.py draws what the model gets, and stops at what training would stop at."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from PIL import Image

from co_detr.tools.draw.boxes import plot_samples, sample_of

pytestmark = pytest.mark.cpu_only("draws what a data loader gives")

TOOL = Path(__file__).parents[2] / "tools" / "inspect_data.py"
CONFIG_FILE = str(Path(__file__).parent / "tiny_config.py")


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("inspect_data", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            *("dataloader.train.mixing.mosaic=1", "dataloader.train.mixing.size=48"),
            *("dataloader.train.mixing.mixup=0.5", "dataloader.train.mapper.variation.hue=0.1"),
            "dataloader.train.mapper.variation.quarter_turns=0.5",
        ],
    ],
    ids=["plain", "mixed and varied"],
)
def test_draws_the_first_samples(main, tiny_data, tmp_path, capsys, overrides):
    picture = tmp_path / "new" / "samples.png"
    arguments = ["--config-file", CONFIG_FILE, "--output", str(picture), "--count", "5"]
    assert main([*arguments, *tiny_data.overrides(tmp_path / "out"), *overrides]) == 0
    assert "5 training samples are drawn" in capsys.readouterr().out
    with Image.open(picture) as image:
        assert image.width > 3 * 300 and image.height > 2 * 200
    assert not (tmp_path / "out").exists()


def test_stops_at_broken_data(main, tiny_data, tmp_path, capsys):
    (tiny_data.images / "3.png").unlink()
    picture = tmp_path / "samples.png"
    arguments = ["--config-file", CONFIG_FILE, "--output", str(picture)]
    assert main([*arguments, *tiny_data.overrides(tmp_path / "out")]) == 2
    assert "error: data.train" in capsys.readouterr().err
    assert not picture.exists()


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_a_sample_is_what_the_mapper_made(image_format):
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)
    channels = red if image_format == "RGB" else red.flip(0)
    instances = Instances((20, 30))
    instances.gt_boxes = Boxes(torch.tensor([[1.0, 2.0, 11.0, 8.0]]))
    instances.gt_classes = torch.tensor([1])
    mapped = {
        "image": channels[:, None, None].expand(3, 20, 30),
        "instances": instances,
        "file_name": "folder/a.png",
    }
    sample = sample_of(mapped, ["cell", "plate"], image_format)
    assert sample.title == "a.png: 30x20, 1 box"
    assert sample.pixels.shape == (20, 30, 3) and np.all(sample.pixels == [255, 0, 0])
    assert sample.boxes[0].xywh == (1, 2, 10, 6) and sample.boxes[0].class_name == "plate"


@pytest.mark.parametrize("as_polygons", [False, True])
def test_masks_of_a_sample(as_polygons):
    polygons = PolygonMasks([[np.array([2.0, 3.0, 12.0, 3.0, 12.0, 9.0, 2.0, 9.0])]])
    instances = Instances((20, 30))
    instances.gt_boxes = Boxes(torch.tensor([[2.0, 3.0, 12.0, 9.0]]))
    instances.gt_classes = torch.tensor([0])
    masks = polygons if as_polygons else BitMasks.from_polygon_masks(polygons, 20, 30)
    instances.gt_masks = masks
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    mapped = {"image": image, "instances": instances, "file_name": "a.png"}
    (box,) = sample_of(mapped, ["cell"], "RGB").boxes
    assert (box.mask.left, box.mask.top) == (2, 3)
    assert box.mask.pixels.shape == (6, 10) and box.mask.pixels.all()


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="at least one sample"):
        plot_samples([], ["cell"], tmp_path / "samples.png")
