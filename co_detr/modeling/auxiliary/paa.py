"""PAA as an auxiliary head: the assignment depends on what the head predicts."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from co_detr.modeling.auxiliary.assigners import BACKGROUND
from co_detr.modeling.auxiliary.dense import DensePredictions, DenseTargets
from co_detr.modeling.auxiliary.towers import TowerHead


class PAAHead(TowerHead):
    """Dense head whose positives are chosen by their losses (Kim and Lee, ECCV 2020).

    Its assigner is a ``PAAAssigner``, its criterion an ``IoUCriterion``. Detections are scored by
    the geometric mean of class score and predicted IoU; the paper's score voting is left out.
    """

    @torch.no_grad()
    def refine(
        self, targets: DenseTargets, predictions: DensePredictions, anchors: list[Tensor]
    ) -> DenseTargets:
        costs = self.criterion.costs(predictions, torch.cat(anchors), targets, self.box_code)
        level_of = torch.cat(
            [torch.full((len(level),), i, device=costs.device) for i, level in enumerate(anchors)]
        )
        candidate = targets.positive(self.num_classes)
        rejected = torch.zeros_like(candidate)
        start = 0
        for image, rows in enumerate(candidate):
            index = rows.nonzero().squeeze(1)
            mine = costs[start : start + len(index)]
            start += len(index)
            chosen = self.assigner.select(targets.truths[image, index], level_of[index], mine)
            rejected[image, index[~chosen]] = True
        return replace(
            targets,
            labels=targets.labels.masked_fill(rejected, self.num_classes),
            boxes=targets.boxes.masked_fill(rejected[..., None], 0.0),
            truths=targets.truths.masked_fill(rejected, BACKGROUND),
        )

    def rescore(self, scores: Tensor, quality: Tensor) -> Tensor:
        return (scores * quality).sqrt()
