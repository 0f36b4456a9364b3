"""Conflict between heads: how far apart are the places that they train the encoder on?

Where a head's training signal lies on the encoder output is found by Grad-CAM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import EventStorage
from matplotlib.figure import Figure
from torch import Tensor

from co_detr.engine.validation import training_without_trace
from co_detr.modeling import CoDETR
from co_detr.seeding import seed_everything
from co_detr.structures import EncoderMemory, TrainingOutput
from co_detr.tools.analyze.discriminability import LevelLayout, layout_of, score_maps
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

DECODER = "decoder"
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
        numbers={name: distances.summary() for name, distances in found.items()},
        tables=(_average_table(found), _directed_table(found)),
        charts=tuple(
            Chart(
                f"distances-{number}",
                f"{name}: distances between heads, mean of both directions.",
                matrix_figure(distances.heads, distances.symmetric, "KL divergence"),
            )
            for number, (name, distances) in enumerate(found.items(), start=1)
        ),
        pictures=tuple(
            picture
            for number, (name, distances) in enumerate(found.items(), start=1)
            for picture in _pictures(number, name, distances, image_format)
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
                arrays = {head: maps[head].cpu().numpy() for head in distances.heads}
                distances.activations.append(arrays)
                distances.pictured.append(sample)
    return distances


def activation_maps(model: CoDETR, sample: Sample) -> dict[str, Tensor]:
    """`activation_map` of every head; needs training mode and an event storage."""
    images = model.preprocess([sample.input])
    memory, losses = head_losses(model, images, sample.input["instances"].to(model.device))
    layout = layout_of(sample, images, memory)
    return {name: activation_map(memory, loss, layout) for name, loss in losses.items()}


def _average_table(found: dict[str, Distances]) -> Table:
    rows = [
        (name, len(distances.heads) - 1, distances.average) for name, distances in found.items()
    ]
    return Table(
        "average",
        "Average distance between heads.",
        ("model", "K", "average distance"),
        tuple(rows),
    )


def _directed_table(found: dict[str, Distances]) -> Table:
    columns = list(dict.fromkeys(head for distances in found.values() for head in distances.heads))
    rows = []
    for name, distances in found.items():
        for head, row in zip(distances.heads, distances.directed.tolist(), strict=True):
            values = dict(zip(distances.heads, row, strict=True))
            rows.append((name, head, *(values.get(column) for column in columns)))
    return Table(
        "directed",
        "Divergence of the head in the row from the head in the column.",
        ("model", "head", *columns),
        tuple(rows),
    )


def _pictures(number: int, name: str, distances: Distances, image_format: str) -> list[Picture]:
    return [
        overlaid(
            f"activation-{number}-{index + 1}",
            f"{name}, {Path(sample.file_name).name}: class activation maps of heads.",
            sample,
            image_format,
            distances.activations[index],
        )
        for index, sample in enumerate(distances.pictured)
    ]


def head_losses(
    model: CoDETR, images: ImageList, truth: Instances
) -> tuple[EncoderMemory, dict[str, Tensor]]:
    """Losses of the decoder and of every auxiliary head, in training mode, on a batch of one image,
    and the memory that they were computed from and are still attached to.

    Of the decoder it is the loss of the one-to-one matched queries of inference, all layers
    together; denoising, customized positive queries and encoder proposals are no part of it. Of an
    auxiliary head it is all that the head is trained by.
    """
    # So that the memory has a gradient even where the whole model is frozen.
    images.tensor.requires_grad_()
    output = model.forward_training(images, [truth])
    losses = {DECODER: _matching_loss(model, output)}
    for name, head in output.auxiliary.items():
        losses[name] = sum(head.losses.values())
    return output.memory, losses


def _matching_loss(model: CoDETR, output: TrainingOutput) -> Tensor:
    # By name: a source may make several groups in training.
    index = [group.name for group in output.groups].index(model.inference_source.name)
    predictions, targets = output.predictions[index], output.targets[index]
    counts = model.criterion.count_positives(targets)
    terms = model.criterion(predictions, targets, output.memory.geometry, counts)
    return sum(term.sum() for term in terms.values())


def activation_map(memory: EncoderMemory, loss: Tensor, layout: LevelLayout) -> Tensor:
    """Grad-CAM of a head, ``(H, W)`` in [0, 1].

    What Grad-CAM explains is the class score; here it is the head's negative loss, which every
    head has, whatever its network, and which grows with the evidence for the head's positives and
    against its negatives. On each level a channel's weight is its mean gradient, and the map is
    the positive part of the weighted sum of channels. Levels are fused as scores are.
    Source: Selvaraju et al., "Grad-CAM", ICCV 2017, equations 1 and 2.
    """
    (gradient,) = torch.autograd.grad(-loss, memory.tokens, retain_graph=True, allow_unused=True)
    if gradient is None:  # a loss that is constant
        gradient = torch.zeros_like(memory.tokens)
    levels = []
    start = 0
    for level, (height, width) in enumerate(memory.level_shapes):
        cells = slice(start, start + height * width)
        start = cells.stop
        features = memory.tokens[0, cells].detach().view(height, width, -1)
        rows, columns = layout.cells_inside(level)
        weights = gradient[0, cells].view(height, width, -1)[:rows, :columns].mean((0, 1))  # (C,)
        levels.append((features @ weights).relu())
    return score_maps(levels, layout).fused


def log_distribution(activation: Tensor) -> Tensor:
    """Log-probabilities ``(H*W,)`` of a map: a softmax over its locations.

    Dividing by the sum would leave locations without any probability, where the divergence is
    infinite. A softmax of values in [0, 1] is at most e times as high in one place as in another,
    so that distances are small numbers.
    """
    return F.log_softmax(activation.double().flatten(), dim=0)


def divergence(first: Tensor, second: Tensor) -> float:
    """Kullback-Leibler divergence of two `log_distribution`: what the second lacks of the first."""
    return float((first.exp() * (first - second)).sum())


def matrix_figure(names: Sequence[str], values: np.ndarray, label: str) -> Figure:
    """A square matrix ``(N, N)`` as a heat map with its numbers; ``label`` names the quantity."""
    side = 2.4 + 0.7 * len(names)
    figure, axes = new_axes(side + 0.8, side)
    drawn = axes.imshow(values, cmap="cividis", vmin=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    middle = values.max() / 2
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        color = "black" if value > middle else "white"
        axes.text(
            column, row, f"{value:.4f}", ha="center", va="center", color=color,
            fontsize=FONT_SIZE - 2,
        )  # fmt: skip
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8)
    bar.set_label(label, fontsize=FONT_SIZE)
    return figure
