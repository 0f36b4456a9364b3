"""Encoder discriminability: do the encoder's features stand out where the objects are?

A value per token becomes score maps in the resolution of the image (`score_maps`); IoF-IoB curves
say how well a map tells objects from background (Co-DETR section 3.4). The attention of the decoder
is measured with the same maps and curves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from torch import Tensor

from co_detr.modeling import CoDETR
from co_detr.structures import EncoderMemory
from co_detr.tools.analyze.report import (
    FONT_SIZE,
    Chart,
    Picture,
    Section,
    Table,
    new_axes,
    overlaid,
)
from co_detr.tools.analyze.subjects import Progress, Sample, Subject

FUSED = "fused"
NUM_STEPS = 4000
NOTHING_TO_MEASURE = "No image has both objects and background: there is nothing to measure."
NUM_PICTURES = 4

# The JSON file has every so manieth point of a curve.
_POINT_STRIDE = 40

# Okabe and Ito's colors without the yellow, which is faint on white.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")

_LINE_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class LevelLayout:
    """How the levels of one image lie over its pixels.

    Attributes:
        image_size: (height, width) of the image itself, without any padding.
        padded_size: (height, width) of the batch, which the levels cover.
        level_shapes: (height, width) of each level, finest first.
    """

    image_size: tuple[int, int]
    padded_size: tuple[int, int]
    level_shapes: Sequence[tuple[int, int]]

    def cells_inside(self, level: int) -> tuple[int, int]:
        """Rows and columns of a level that begin inside the image.

        These are the ones that the encoder does not mask; where a model takes the padding for a
        part of the image, they are still left out here.
        """
        rows, columns = (
            -(-size * cells // padded)
            for size, cells, padded in zip(
                self.image_size, self.level_shapes[level], self.padded_size, strict=True
            )
        )
        return rows, columns


@dataclass(frozen=True)
class ScoreMaps:
    """Scores in [0, 1] of one image, ``(H, W)`` each: one map per level, and their mean."""

    levels: list[Tensor]
    fused: Tensor

    def named(self) -> dict[str, Tensor]:
        """All of them by name: "fused", then "level 1", the finest, and so on."""
        levels = {f"level {number}": level for number, level in enumerate(self.levels, start=1)}
        return {FUSED: self.fused, **levels}


def score_maps(values: Sequence[Tensor], layout: LevelLayout) -> ScoreMaps:
    """Score maps of one image as the paper makes them.

    Every level is divided by its maximum, resized to the image, and the mean over levels is taken.
    Padding is cut off first: it is in no maximum and does not bleed into the image.
    Source: Co-DETR equation 7. What it leaves open is filled in from its authors' answer to a
    question about it: the maximum is one of the level before it is resized, bilinearly.

    Args:
        values: ``(H_l, W_l)`` per level, not negative. A level without any positive value has the
            score 0 everywhere.
    """
    levels = []
    for level, scores in enumerate(values):
        rows, columns = layout.cells_inside(level)
        inside = scores[:rows, :columns]
        inside = inside / inside.max().clamp(min=torch.finfo(inside.dtype).tiny)
        resized = F.interpolate(
            inside[None, None], layout.image_size, mode="bilinear", align_corners=False
        )
        levels.append(resized[0, 0])
    return ScoreMaps(levels, torch.stack(levels).mean(0))


def fold(values: Tensor, level_shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Values of all tokens ``(S,)`` -> ``(H_l, W_l)`` per level."""
    parts = values.split([height * width for height, width in level_shapes])
    return [part.view(shape) for part, shape in zip(parts, level_shapes, strict=True)]


@dataclass(frozen=True)
class Curve:
    """Shares of the foreground and of the background whose score reaches a threshold.

    Attributes:
        iof, iob: ``(T,)`` at thresholds from 0, where all is in, to 1, and one beyond, where
            nothing is.
    """

    iof: np.ndarray
    iob: np.ndarray

    @property
    def auc(self) -> float:
        """Area under IoF over IoB, by trapezoids: 1 is perfect, 0.5 chance.

        For one image it is the probability that a foreground pixel scores higher than a background
        pixel, ties counting half. A constant map thus has 0.5.
        """
        heights = (self.iof[1:] + self.iof[:-1]) / 2
        return float((heights * -np.diff(self.iob)).sum())


def thresholds(device: torch.device | None = None) -> Tensor:
    """``(T - 1,)`` float64 from 0 to 1, without the one that no score reaches.

    They are dense at both ends: attention is near 0 almost everywhere, and norms of features that
    a layer norm made are all near their maximum.
    """
    share = torch.arange(NUM_STEPS + 1, dtype=torch.float64, device=device) / NUM_STEPS
    low, high = share**3, (1 - share) ** 3
    return low / (low + high)


def foreground_mask(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """``(H, W)`` bool: pixels whose center lies in a box, ``(G, 4)`` absolute xyxy."""
    y = torch.arange(size[0], device=boxes.device, dtype=boxes.dtype) + 0.5
    x = torch.arange(size[1], device=boxes.device, dtype=boxes.dtype) + 0.5
    in_rows = (y >= boxes[:, 1, None]) & (y < boxes[:, 3, None])  # (G, H)
    in_columns = (x >= boxes[:, 0, None]) & (x < boxes[:, 2, None])  # (G, W)
    # Box by box would take G maps; as a product of matrices it takes one.
    return (in_rows.float().T @ in_columns.float()) > 0


def image_curve(scores: Tensor, foreground: Tensor) -> Curve:
    """Curve of one image.

    Args:
        scores: ``(H, W)`` in [0, 1]; foreground: ``(H, W)`` bool with both values.
    """
    return Curve(_reached(scores[foreground]), _reached(scores[~foreground]))


def _reached(scores: Tensor) -> np.ndarray:
    """Share of the scores at or above each threshold, ``(T,)``."""
    steps = thresholds(scores.device)
    below = torch.bucketize(scores.double(), steps, right=True)  # how many thresholds it reaches
    counts = torch.bincount(below, minlength=len(steps) + 1).cpu().numpy()
    at_least = counts[::-1].cumsum()[::-1] / counts.sum()
    return np.append(at_least[1:], 0.0)


class MeanCurve:
    """Mean over images of IoF and of IoB at the same thresholds.

    The mean over images, and not over all pixels, so that every image counts alike whatever its
    size and that of its objects; the paper does not say which.
    """

    def __init__(self) -> None:
        self.image_aucs: list[float] = []  # areas under the images' own curves
        self._iof = self._iob = 0.0

    def add(self, scores: Tensor, foreground: Tensor) -> None:
        """Adds an image that `has_curve`; see `image_curve`."""
        curve = image_curve(scores, foreground)
        self.image_aucs.append(curve.auc)
        self._iof = self._iof + curve.iof
        self._iob = self._iob + curve.iob

    @property
    def curve(self) -> Curve:
        """Needs an image."""
        return Curve(self._iof / len(self.image_aucs), self._iob / len(self.image_aucs))

    def summary(self) -> dict[str, float | None]:
        """What the report's JSON file says about it."""
        aucs = np.array(self.image_aucs)
        error = None  # unknown from a single image
        if len(aucs) > 1:
            error = float(aucs.std(ddof=1) / len(aucs) ** 0.5)
        return {
            "auc": self.curve.auc,
            "image_auc_mean": float(aucs.mean()),
            "image_auc_standard_error": error,
        }


def has_curve(foreground: Tensor) -> bool:
    """Whether an image has both objects and background, without which there is no curve."""
    return bool(foreground.any()) and not bool(foreground.all())


def curve_chart(name: str, caption: str, curves: Mapping[str, MeanCurve]) -> Chart:
    """IoF over IoB by label, with the area under each in the legend, and chance as a thin line."""
    figure, axes = new_axes()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
    for index, (label, mean) in enumerate(curves.items()):
        axes.plot(
            mean.curve.iob,
            mean.curve.iof,
            label=f"{label} (AUC {mean.curve.auc:.3f})",
            color=_COLORS[index % len(_COLORS)],
            linestyle=_LINE_STYLES[index % len(_LINE_STYLES)],  # tells lines apart in gray, too
            linewidth=1.8,
        )
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set_xlabel("IoB: share of background above threshold", fontsize=FONT_SIZE)
    axes.set_ylabel("IoF: share of objects above threshold", fontsize=FONT_SIZE)
    axes.legend(fontsize=FONT_SIZE - 2, loc="lower right", frameon=False)
    return Chart(name, caption, figure)


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


def area_table(name: str, caption: str, examined: Sequence[Examined], prefix: str = "") -> Table:
    """Areas under the curves: a row per model, a column per map whose name begins so."""
    names = dict.fromkeys(key for result in examined for key in result.curves)
    keys = [key for key in names if key.startswith(prefix)]
    rows = []
    for result in examined:
        areas = {key: mean.curve.auc for key, mean in result.curves.items()}
        rows.append((result.name, *(areas.get(key) for key in keys)))
    return Table(name, caption, ("model", *(key.removeprefix(prefix) for key in keys)), tuple(rows))


def curve_numbers(examined: Iterable[Examined]) -> dict:
    """For the JSON file: areas, their spread over images, and points of the curves."""
    return {
        result.name: {
            "images": result.num_images,
            "maps": {
                key: {**mean.summary(), **_points(mean.curve)}
                for key, mean in result.curves.items()
            },
        }
        for result in examined
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
    return tuple(
        overlaid(
            f"map-{index + 1}",
            f"{Path(sample.file_name).name}: {caption}",
            sample,
            image_format,
            {result.name: result.heat_maps[index] for result in examined},
        )
        for index, sample in enumerate(examined[0].pictured)
    )


_TEXT = """The score of a location is the L2 norm of the encoder's output feature, divided by the \
largest one of its level and image; levels are resized to the image and averaged. At every \
threshold, IoF is the share of the area inside ground-truth boxes whose score reaches it, and IoB \
the share of the area outside. Both are averaged over the {images} images that have objects and \
background. The area under IoF over IoB is 1 for a perfect map and 0.5 for chance. The JSON file \
also has the mean and the standard error of the areas of single images.

A curve above another says that its features tell objects from background by their norm alone. It \
does not say that they do so better by other means, such as a head.

Source: Co-DETR (Zong et al., ICCV 2023), section 3.4, equations 7 and 8, figures 2 and 3. The \
paper's foreground are objects; here it is their boxes."""


def feature_maps(model: CoDETR, sample: Sample) -> dict[str, Tensor]:
    """Score maps ``(H, W)`` of the encoder output, fused and by level.

    The score of a location is the L2 norm of its feature; see `score_maps` for the rest.
    """
    images = model.preprocess([sample.input])
    memory = model.encode(images)
    layout = layout_of(sample, images, memory)
    norms = fold(memory.tokens[0].float().norm(dim=-1), memory.level_shapes)
    return score_maps(norms, layout).named()


def layout_of(sample: Sample, images: ImageList, memory: EncoderMemory) -> LevelLayout:
    """Of a batch of one image."""
    return LevelLayout(
        image_size=tuple(sample.input["image"].shape[-2:]),
        padded_size=tuple(images.tensor.shape[-2:]),
        level_shapes=memory.level_shapes,
    )


def measure_discriminability(
    subjects: Sequence[Subject], samples: Sequence[Sample], progress: Progress
) -> Section:
    """IoF-IoB curves of the encoder output (Co-DETR figures 2 and 3), one line per model."""
    examined = [
        examine(
            subject.name,
            samples,
            progress,
            lambda sample, model=subject.model: feature_maps(model, sample),
            FUSED,
        )
        for subject in subjects
    ]
    key, title = "discriminability", "Encoder discriminability"
    if not examined[0].num_images:
        return Section(key, title, NOTHING_TO_MEASURE, {})
    by_level = tuple(
        curve_chart(f"levels-{number}", f"{result.name}: the levels and their mean.", result.curves)
        for number, result in enumerate(examined, start=1)
    )
    across = curve_chart(
        "models",
        "IoF-IoB curves of the encoder's features, fused over levels.",
        {result.name: result.curves[FUSED] for result in examined},
    )
    return Section(
        key=key,
        title=title,
        text=_TEXT.format(images=examined[0].num_images),
        numbers=curve_numbers(examined),
        tables=(
            area_table(
                "areas",
                "Area under the IoF-IoB curve, fused and by level, the finest first.",
                examined,
            ),
        ),
        charts=(across, *by_level),
        pictures=heat_map_pictures(
            "discriminability scores, fused over levels; colors from the lowest to the highest "
            "score of each map.",
            examined,
            subjects[0].cfg.data.image_format,
        ),
    )
