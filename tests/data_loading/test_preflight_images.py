"""Image files that the preflight decodes: values of more than 8 bits, thin and too large images."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from co_detr.data.images import ImageReader
from co_detr.data.preflight import preflight
from co_detr.errors import DataError
from tests.data_loading.preflight_data import HEIGHT, WIDTH


def write_deep(data, values, suffix="png"):
    """Gives all images random values from `values` (low, high), of the type of `low`."""
    low, high = values
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for image in getattr(data, split)["images"]:
            image["file_name"] = f"deep_{image['id']}.{suffix}"
            pixels = low + (high - low) * rng.random((HEIGHT, WIDTH))
            Image.fromarray(pixels.astype(low.dtype)).save(data.root / split / image["file_name"])
    data.write()


def deep_report(data, value_range=None):
    splits = [data.files("train"), data.files("val")]
    return preflight(splits, reader=ImageReader(value_range))


def test_values_that_use_a_small_part_of_their_type(data):
    write_deep(data, np.array([300, 4380], np.uint16))
    report = deep_report(data)
    assert "7 images have more than 8 bits: 0 to 65535 (the range of their type)" in report.text()
    (finding,) = report.findings
    assert finding.level == "warning" and finding.count == 7
    assert "small part of the range of their type, 0 to 65535" in finding.what
    suggested = re.search(r"data.value_range=(\[\d+,\d+\])", finding.remedy).group(1)
    assert np.abs(np.array(json.loads(suggested)) - [300, 4380]).max() < 30
    with_range = deep_report(data, json.loads(suggested))
    assert with_range.findings == [] and "(data.value_range) becomes" in with_range.text()


@pytest.mark.parametrize("kind", [np.uint16, np.uint8])
def test_values_that_use_their_range_are_fine(data, kind):
    write_deep(data, np.array([0, np.iinfo(kind).max], kind))
    assert deep_report(data).findings == []


def test_values_outside_the_range(data):
    write_deep(data, np.array([1000, 60000], np.uint16))
    (finding,) = deep_report(data, (0, 255)).findings
    assert (
        finding.count == 7 and "most of whose values lie outside data.value_range" in finding.what
    )


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_values_whose_range_is_not_known(data, kind):
    write_deep(data, np.array([-500, 1500], kind), "tif")
    with pytest.raises(DataError, match=r"without data.value_range: 7 .*use \[-49\d.*,149\d"):
        deep_report(data).raise_on_errors()
    assert deep_report(data, (-500, 1500)).findings == []


def test_values_that_are_no_numbers(data):
    write_deep(data, np.array([0, 1], np.float32), "tif")
    path = data.root / "val" / "deep_1.tif"
    Image.fromarray(np.full((HEIGHT, WIDTH), np.nan, np.float32)).save(path)
    (finding,) = deep_report(data, (0, 1)).findings
    assert finding.level == "error" and finding.count == 1 and str(path) in finding.first


def test_images_that_are_very_thin_or_too_large(data):
    Image.new("RGB", (1000, 1)).save(data.root / "train" / "0.jpg")
    data.train["images"][0].update(width=1000, height=1)
    data.train["annotations"] = data.train["annotations"][3:]
    data.write()
    assert (1, "images that are more than 100 times as long as wide") in data.warnings()
    limit = preflight([data.files("train")], reader=ImageReader(max_pixels=1500))
    assert [(error.count, error.what) for error in limit.errors] == [
        (3, "images with more pixels than data.max_image_pixels")
    ]
    assert "raise data.max_image_pixels" in limit.errors[0].remedy
