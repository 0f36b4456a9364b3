"""Where a head's training signal lies on the encoder output: Grad-CAM of heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.structures import ImageList, Instances
from torch import Tensor

from co_detr.analysis.score_maps import Geometry, score_maps
from co_detr.modeling import CoDETR
from co_detr.structures import EncoderMemory, TrainingOutput

DECODER = "decoder"


@dataclass(frozen=True)
class HeadLosses:
    """The loss of each head on one image, still attached to the memory it was computed from."""

    memory: EncoderMemory
    losses: dict[str, Tensor]


def head_losses(model: CoDETR, images: ImageList, truth: Instances) -> HeadLosses:
    """Losses of the decoder and of every auxiliary head, in training mode, on a batch of one image.

    Of the decoder it is the loss of the one-to-one matched queries of inference, all layers
    together; denoising, customised positive queries and encoder proposals are no part of it. Of an
    auxiliary head it is all that the head is trained by.
    """
    # So that the memory has a gradient even where the whole model is frozen.
    images.tensor.requires_grad_()
    output = model.training_step(images, [truth])
    losses = {DECODER: _matching_loss(model, output)}
    for name, head in output.auxiliary.items():
        losses[name] = sum(head.losses.values())
    return HeadLosses(output.memory, losses)


def _matching_loss(model: CoDETR, output: TrainingOutput) -> Tensor:
    # By name: a source may make several groups in training.
    index = [group.name for group in output.groups].index(model.inference_source.name)
    predictions, targets = output.predictions[index], output.targets[index]
    counts = model.criterion.count_positives(targets)
    terms = model.criterion(predictions, targets, output.memory.image_sizes, counts)
    return sum(term.sum() for term in terms.values())


def activation_map(memory: EncoderMemory, loss: Tensor, geometry: Geometry) -> Tensor:
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
        rows, columns = geometry.cells_inside(level)
        weights = gradient[0, cells].view(height, width, -1)[:rows, :columns].mean((0, 1))  # (C,)
        levels.append((features @ weights).relu())
    return score_maps(levels, geometry).fused


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
