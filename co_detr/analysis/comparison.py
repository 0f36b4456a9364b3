"""IoF-IoB curves of several models on the same images, and what the report shows of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from co_detr.analysis.drawing import heat_map, iof_iob_figure, pixels_of, side_by_side
from co_detr.analysis.iof_iob import Curve, MeanCurve, foreground_mask, has_curve
from co_detr.analysis.section import Chart, Picture, Table
from co_detr.analysis.subject import Progress, Sample

NOTHING_TO_MEASURE = "No image has both objects and background: there is nothing to measure."
NUM_PICTURES = 4
# The JSON file has every so manieth point of a curve.
_POINT_STRIDE = 40


@dataclass(frozen=True)
class Examined:
    """What a model's score maps are worth.

    Attributes:
        name: of the model; curves: by name of the map.
        heat_maps: score maps ``(H, W)`` of the first images, for pictures.
        pictured: these images.
    """

    name: str
    curves: dict[str, MeanCurve] = field(default_factory=dict)
    heat_maps: list[np.ndarray] = field(default_factory=list)
    pictured: list[Sample] = field(default_factory=list)

    @property
    def num_images(self) -> int:
        return max((len(mean.image_aucs) for mean in self.curves.values()), default=0)


@torch.no_grad()
def examine(
    name: str,
    samples: Sequence[Sample],
    progress: Progress,
    maps_of: Callable[[Sample], dict[str, Tensor]],
    pictured: str,
) -> Examined:
    """Measures a model on the images that have objects, and background beside them.

    Args:
        maps_of: score maps ``(H, W)`` of an image by name, the same names for every image.
        pictured: name of the map that pictures show.
    """
    examined = Examined(name)
    for sample in progress(samples):
        boxes = sample.input["instances"].gt_boxes.tensor
        foreground = foreground_mask(boxes, tuple(sample.input["image"].shape[-2:]))
        if not has_curve(foreground):
            continue
        maps = maps_of(sample)
        for key, scores in maps.items():
            mean = examined.curves.setdefault(key, MeanCurve())
            mean.add(scores, foreground.to(scores.device))
        if len(examined.pictured) < NUM_PICTURES:
            examined.heat_maps.append(maps[pictured].cpu().numpy())
            examined.pictured.append(sample)
    return examined


def chart_of_models(name: str, caption: str, examined: Iterable[Examined], key: str) -> Chart:
    """The curve of one map, a line per model."""
    curves = {each.name: each.curves[key].curve for each in examined}
    return Chart(name, caption, iof_iob_figure(curves))


def chart_of_maps(name: str, caption: str, examined: Examined, keys: Iterable[str]) -> Chart:
    """The curves of one model, a line per map."""
    curves = {key: examined.curves[key].curve for key in keys}
    return Chart(name, caption, iof_iob_figure(curves))


def area_table(name: str, caption: str, examined: Sequence[Examined], prefix: str = "") -> Table:
    """Areas under the curves: a row per model, a column per map whose name begins so."""
    names = dict.fromkeys(key for each in examined for key in each.curves)
    keys = [key for key in names if key.startswith(prefix)]
    rows = []
    for each in examined:
        areas = {key: mean.curve.auc for key, mean in each.curves.items()}
        rows.append((each.name, *(areas.get(key) for key in keys)))
    return Table(name, caption, ("model", *(key.removeprefix(prefix) for key in keys)), tuple(rows))


def numbers(examined: Iterable[Examined]) -> dict:
    """For the JSON file: areas, their spread over images, and points of the curves."""
    return {
        each.name: {
            "images": each.num_images,
            "maps": {
                key: {**mean.summary(), **_points(mean.curve)} for key, mean in each.curves.items()
            },
        }
        for each in examined
    }


def _points(curve: Curve) -> dict[str, list[float]]:
    return {
        "iof": curve.iof[::_POINT_STRIDE].round(5).tolist(),
        "iob": curve.iob[::_POINT_STRIDE].round(5).tolist(),
    }


def heat_map_pictures(
    caption: str, examined: Sequence[Examined], image_format: str
) -> tuple[Picture, ...]:
    """Per image the image itself, and beside it the score map of every model."""
    pictures = []
    for index, sample in enumerate(examined[0].pictured):
        rgb = pixels_of(sample, image_format)
        overlays = {each.name: heat_map(rgb, each.heat_maps[index]) for each in examined}
        boxes = sample.input["instances"].gt_boxes.tensor.cpu().numpy()
        pictures.append(
            Picture(
                name=f"map-{index + 1}",
                caption=f"{Path(sample.file_name).name}: {caption}",
                image=side_by_side({"image": rgb, **overlays}, boxes),
            )
        )
    return tuple(pictures)
