"""Which query of a decoder is matched to which object, outside of training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from detectron2.structures import Instances
from torch import Tensor

from co_detr.modeling import CoDETR
from co_detr.modeling.boxes import normalise_boxes
from co_detr.modeling.matching import solve_assignment
from co_detr.structures import EncoderMemory, GroundTruth, QuerySet


@dataclass(frozen=True)
class QueryMatching:
    """One-to-one matching of Q queries in one image.

    Attributes:
        truths: ``(Q,)`` index of the matched ground truth, -1 for none.
        tokens: ``(Q,)`` encoder token that each query was made from; None where queries are not
            made from tokens.
    """

    truths: np.ndarray
    tokens: np.ndarray | None


def match_queries(model: CoDETR, memory: EncoderMemory, truth: Instances) -> QueryMatching:
    """Matches the last decoder layer, as training does, in a batch of one image.

    Args:
        model: in any mode.
        memory: encoder output.
        truth: ``gt_boxes`` in absolute pixels of the network input, and ``gt_classes``.
    """
    group = model.inference_source(memory)
    predictions = model.decoder(QuerySet.concat([group]), memory)
    size = tuple(memory.image_sizes[0])
    normalised = normalised_truth(truth, size, predictions.boxes)
    cost = model.assigner.cost(predictions, 0, GroundTruth(truth.gt_classes, normalised, size))
    # As in the assigner: a diverged model has NaN costs, and any assignment will do.
    host = np.nan_to_num(cost[-1:].cpu().numpy(), nan=1e5, posinf=1e5, neginf=-1e5)
    tokens = None if group.tokens is None else group.tokens[0].cpu().numpy()
    return QueryMatching(solve_assignment(host)[0], tokens)


def normalised_truth(truth: Instances, size: tuple[int, int], like: Tensor) -> Tensor:
    """Normalised boxes ``(G, 4)`` of a ground truth, in the type of `like`."""
    return normalise_boxes(truth.gt_boxes.tensor.to(like.dtype), size)
