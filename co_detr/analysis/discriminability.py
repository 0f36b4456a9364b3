"""Encoder discriminability: do the encoder's features stand out where the objects are?"""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.structures import ImageList
from torch import Tensor

from co_detr.analysis import comparison
from co_detr.analysis.score_maps import FUSED, Geometry, fold, score_maps
from co_detr.analysis.section import Section
from co_detr.analysis.subject import Progress, Sample, Subject
from co_detr.modeling import CoDETR
from co_detr.structures import EncoderMemory

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
    geometry = geometry_of(sample, images, memory)
    norms = fold(memory.tokens[0].float().norm(dim=-1), memory.level_shapes)
    return score_maps(norms, geometry).named()


def geometry_of(sample: Sample, images: ImageList, memory: EncoderMemory) -> Geometry:
    """Of a batch of one image."""
    return Geometry(
        image_size=tuple(sample.input["image"].shape[-2:]),
        padded_size=tuple(images.tensor.shape[-2:]),
        level_shapes=memory.level_shapes,
    )


def measure_discriminability(
    subjects: Sequence[Subject], samples: Sequence[Sample], progress: Progress
) -> Section:
    """IoF-IoB curves of the encoder output (Co-DETR figures 2 and 3), one line per model."""
    examined = [
        comparison.examine(
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
        return Section(key, title, comparison.NOTHING_TO_MEASURE, {})
    by_level = tuple(
        comparison.chart_of_maps(
            f"levels-{number}", f"{each.name}: the levels and their mean.", each, each.curves
        )
        for number, each in enumerate(examined, start=1)
    )
    across = comparison.chart_of_models(
        "models", "IoF-IoB curves of the encoder's features, fused over levels.", examined, FUSED
    )
    return Section(
        key=key,
        title=title,
        text=_TEXT.format(images=examined[0].num_images),
        numbers=comparison.numbers(examined),
        tables=(
            comparison.area_table(
                "areas",
                "Area under the IoF-IoB curve, fused and by level, the finest first.",
                examined,
            ),
        ),
        charts=(across, *by_level),
        pictures=comparison.heat_map_pictures(
            "discriminability scores, fused over levels; colours from the lowest to the highest "
            "score of each map.",
            examined,
            subjects[0].cfg.data.image_format,
        ),
    )
