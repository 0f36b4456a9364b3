"""Decoder attention: does the cross-attention fall on the objects?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from co_detr.analysis import comparison
from co_detr.analysis.attention_maps import captured_attention
from co_detr.analysis.discriminability import geometry_of
from co_detr.analysis.matching import match_queries
from co_detr.analysis.score_maps import FUSED, score_maps
from co_detr.analysis.section import Section
from co_detr.analysis.subject import Progress, Sample, Subject
from co_detr.errors import AnalysisError
from co_detr.modeling import CoDETR

ALL, MATCHED = "all queries", "matched queries"
LAST, MEAN = "last layer", "mean of layers"

_TEXT = """The score of a location is the attention that it gets in the decoder's cross-attention, \
summed over heads and queries; of deformable attention each sampled point puts its weight on the \
four cells that it is interpolated from. Scores then become maps and curves as those of the \
encoder: each level is divided by its largest score, resized to the image, and levels are \
averaged; IoF and IoB are averaged over the {images} images that have objects and background.

"All queries" are those of inference. "Matched queries" are those among them that one-to-one \
matching gives an object, one for each, as in training; they are told apart without any threshold \
on scores, which models of different training would pass differently. As the ground truth chose \
them, even those of an untrained model lie near objects, and score well above 0.5. "Mean of \
layers" is the mean of the layers' attention before levels are divided by their maximum.

Deformable attention samples few points, so that many locations have no attention at all: their \
part of the curve, at its upper right, is a straight line.

Source: Co-DETR (Zong et al., ICCV 2023), section 3.4 and figure 2, which leave open which queries \
and layers are meant."""


def attention_maps(model: CoDETR, sample: Sample) -> dict[str, Tensor]:
    """Score maps ``(H, W)`` of the decoder's attention by name of queries, layers and level.

    Raises:
        AnalysisError: if the decoder's kind of attention is not known.
    """
    images = model.preprocess([sample.input])
    memory = model.encode(images)
    geometry = geometry_of(sample, images, memory)
    truth = sample.input["instances"].to(model.device)
    with captured_attention(model.decoder) as captured:
        matched = match_queries(model, memory, truth).truths >= 0
    matched = torch.from_numpy(matched).to(model.device)
    maps = {}
    for name, chosen in ((ALL, torch.ones_like(matched)), (MATCHED, matched)):
        layers = [layer.maps(chosen) for layer in captured]
        mean = [torch.stack(level).mean(0) for level in zip(*layers, strict=True)]
        for key, values in ((LAST, layers[-1]), (MEAN, mean)):
            for part, scores in score_maps(values, geometry).named().items():
                maps[_key(name, key, part)] = scores
        for number, values in enumerate(layers[:-1], start=1):
            maps[_key(name, f"layer {number}", FUSED)] = score_maps(values, geometry).fused
    return maps


def _key(queries: str, layers: str, part: str = FUSED) -> str:
    return f"{queries}, {layers}" + ("" if part == FUSED else f", {part}")


def measure_attention(
    subjects: Sequence[Subject], samples: Sequence[Sample], progress: Progress
) -> Section:
    """IoF-IoB curves of the decoder's cross-attention (Co-DETR figure 2), one line per model."""
    examined, remarks = [], []
    for subject in subjects:
        if subject.model.decoder is None:
            remarks.append(f"{subject.name} has no decoder and is left out.")
            continue
        try:
            found = comparison.examine(
                subject.name,
                samples,
                progress,
                lambda sample, model=subject.model: attention_maps(model, sample),
                _key(ALL, LAST),
            )
        except AnalysisError as error:
            remarks.append(f"{subject.name} is left out: {error.sentence}")
            continue
        examined.append(found)
    key, title = "attention", "Decoder attention"
    if not any(each.num_images for each in examined):
        reason = comparison.NOTHING_TO_MEASURE if examined else "No model has a decoder to look at."
        return Section(key, title, "\n\n".join([reason, *remarks]), {})
    text = _TEXT.format(images=examined[0].num_images)
    return Section(
        key=key,
        title=title,
        text="\n\n".join([text, *remarks]),
        numbers=comparison.numbers(examined),
        tables=tuple(
            comparison.area_table(
                f"areas-{name.split()[0]}",
                f"Area under the IoF-IoB curve of {name}, fused over levels unless one is named.",
                examined,
                prefix=f"{name}, ",
            )
            for name in (ALL, MATCHED)
        ),
        charts=tuple(
            comparison.chart_of_models(
                f"{name.split()[0]}-{layers.split()[0]}",
                f"IoF-IoB curves of the attention of {name}, {layers}.",
                examined,
                _key(name, layers),
            )
            for name in (ALL, MATCHED)
            for layers in (LAST, MEAN)
        ),
        pictures=comparison.heat_map_pictures(
            f"attention of {ALL}, {LAST}, fused over levels; colours from the lowest to the "
            "highest score of each map.",
            examined,
            subjects[0].cfg.data.image_format,
        ),
    )
