"""Conflict between heads: how far apart are the places that they train the encoder on?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from detectron2.utils.events import EventStorage
from torch import Tensor

from co_detr.analysis.class_activation import (
    DECODER,
    activation_map,
    divergence,
    head_losses,
    log_distribution,
)
from co_detr.analysis.discriminability import geometry_of
from co_detr.analysis.drawing import heat_map, matrix_figure, pixels_of, side_by_side
from co_detr.analysis.section import Chart, Picture, Section, Table
from co_detr.analysis.subject import Progress, Sample, Subject
from co_detr.engine.validation_loss import training_without_trace
from co_detr.modeling import CoDETR
from co_detr.seeding import seed_everything

NUM_PICTURES = 2

_TEXT = """The distance of head i to head j is the Kullback-Leibler divergence of their class \
activation maps on the encoder output, averaged over images. Heads that are trained on the same \
places in the same channels are close; a large distance says that they pull the encoder in \
different ways. It has a direction; the charts show the mean of both.

The map of a head is Grad-CAM with the head's negative training loss as the score that is \
explained: that of the matched queries for the decoder, all its own for an auxiliary head. Each \
level is divided by its maximum, levels are averaged, and a softmax over locations makes the map a \
distribution. The paper names Grad-CAM, the encoder output and the divergence; the score, the way \
levels are fused and the softmax are choices made here. Numbers can be compared with each other, \
not with the paper's.

The average distance is taken among auxiliary heads, or, if there is one only, between it and the \
decoder.

Source: Co-DETR (Zong et al., ICCV 2023), "conflicts analysis" of the ablation study and of the \
supplement, equations 9 and 10, figures 6, 8 and 9."""


@dataclass(frozen=True)
class Distances:
    """Distances between the N heads of a model.

    Attributes:
        heads: their names, the decoder first.
        images: ``(N, N)`` per image; row i, column j is the divergence of i from j.
        activations: maps ``(H, W)`` of the first images by head, for pictures.
        pictured: these images.
    """

    heads: list[str]
    images: list[np.ndarray] = field(default_factory=list)
    activations: list[dict[str, np.ndarray]] = field(default_factory=list)
    pictured: list[Sample] = field(default_factory=list)

    @property
    def directed(self) -> np.ndarray:
        """``(N, N)``, the paper's S (equation 9)."""
        return np.mean(self.images, axis=0)

    @property
    def symmetric(self) -> np.ndarray:
        """``(N, N)``, the mean of both directions."""
        return (self.directed + self.directed.T) / 2

    @property
    def average(self) -> float:
        """Mean distance among auxiliary heads; of a single one, to the decoder (equation 10)."""
        heads = self.symmetric if len(self.heads) == 2 else self.symmetric[1:, 1:]
        return float(heads.sum() / (len(heads) * (len(heads) - 1)))

    def summary(self) -> dict:
        """For the JSON file."""
        return {
            "images": len(self.images),
            "heads": self.heads,
            "directed": self.directed.tolist(),
            "symmetric": self.symmetric.tolist(),
            "average": self.average,
        }


def measure_conflict(
    subjects: Sequence[Subject], samples: Sequence[Sample], progress: Progress
) -> Section:
    """Distances between the heads of each model (Co-DETR figures 6, 8 and 9)."""
    key, title = "conflict", "Conflict between heads"
    found: dict[str, Distances] = {}
    remarks = []
    for subject in subjects:
        model = subject.model
        if model.decoder is None or model.auxiliary is None:
            remarks.append(
                f"{subject.name} is left out: it has no decoder and auxiliary heads to compare."
            )
            continue
        found[subject.name] = distances_of(model, samples, progress)
    if not found:
        text = "No model has both a decoder and an auxiliary head, so that nothing can conflict."
        return Section(key, title, "\n\n".join([text, *remarks]), {})
    image_format = subjects[0].cfg.data.image_format
    return Section(
        key=key,
        title=title,
        text="\n\n".join([_TEXT, *remarks]),
        numbers={name: each.summary() for name, each in found.items()},
        tables=(_average_table(found), _directed_table(found)),
        charts=tuple(
            Chart(
                f"distances-{number}",
                f"{name}: distances between heads, mean of both directions.",
                matrix_figure(each.heads, each.symmetric, "KL divergence"),
            )
            for number, (name, each) in enumerate(found.items(), start=1)
        ),
        pictures=tuple(
            picture
            for number, (name, each) in enumerate(found.items(), start=1)
            for picture in _pictures(number, name, each, image_format)
        ),
    )


def distances_of(model: CoDETR, samples: Sequence[Sample], progress: Progress) -> Distances:
    """Measures a model; its weights, its buffers and all generators stay as they are."""
    distances = Distances([DECODER, *model.auxiliary.heads])
    seed = torch.initial_seed()
    # The storage takes what heads log about themselves.
    with training_without_trace(model, model.device), EventStorage(), torch.enable_grad():
        for number, sample in enumerate(progress(samples)):
            seed_everything("conflict", seed, number)
            maps = activation_maps(model, sample)
            logs = [log_distribution(maps[head]) for head in distances.heads]
            rows = [[divergence(first, second) for second in logs] for first in logs]
            distances.images.append(np.array(rows))
            if len(distances.pictured) < NUM_PICTURES:
                arrays = {head: each.cpu().numpy() for head, each in maps.items()}
                distances.activations.append(arrays)
                distances.pictured.append(sample)
    return distances


def activation_maps(model: CoDETR, sample: Sample) -> dict[str, Tensor]:
    """`activation_map` of every head; needs training mode and an event storage."""
    images = model.preprocess([sample.input])
    found = head_losses(model, images, sample.input["instances"].to(model.device))
    geometry = geometry_of(sample, images, found.memory)
    return {
        name: activation_map(found.memory, loss, geometry) for name, loss in found.losses.items()
    }


def _average_table(found: dict[str, Distances]) -> Table:
    rows = [(name, len(each.heads) - 1, each.average) for name, each in found.items()]
    return Table(
        "average",
        "Average distance between heads.",
        ("model", "K", "average distance"),
        tuple(rows),
    )


def _directed_table(found: dict[str, Distances]) -> Table:
    columns = list(dict.fromkeys(head for each in found.values() for head in each.heads))
    rows = []
    for name, each in found.items():
        for head, row in zip(each.heads, each.directed.tolist(), strict=True):
            values = dict(zip(each.heads, row, strict=True))
            rows.append((name, head, *(values.get(column) for column in columns)))
    return Table(
        "directed",
        "Divergence of the head in the row from the head in the column.",
        ("model", "head", *columns),
        tuple(rows),
    )


def _pictures(number: int, name: str, distances: Distances, image_format: str) -> list[Picture]:
    pictures = []
    for index, sample in enumerate(distances.pictured):
        rgb = pixels_of(sample, image_format)
        maps = distances.activations[index]
        overlays = {head: heat_map(rgb, maps[head]) for head in distances.heads}
        boxes = sample.input["instances"].gt_boxes.tensor.cpu().numpy()
        pictures.append(
            Picture(
                name=f"activation-{number}-{index + 1}",
                caption=f"{name}, {Path(sample.file_name).name}: class activation maps of heads.",
                image=side_by_side({"image": rgb, **overlays}, boxes),
            )
        )
    return pictures
