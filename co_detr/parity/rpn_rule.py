"""How mmdet and Detectron2 match RPN anchors, and whether only their known difference shows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.modeling.matcher import Matcher
from torch import Tensor

THRESHOLDS, LABELS = (0.3, 0.7), (0, -1, 1)
LOW_QUALITY_IOU = 0.3


def match(matcher: Matcher, overlaps: Tensor) -> Tensor:
    """``(G, R)`` -> ``(R,)``: 1-based ground truth, 0 for background, -1 for ignored."""
    truths, labels = matcher(overlaps)
    return torch.where(labels > 0, truths + 1, labels.long())


def rpn_matcher(allow_low_quality: bool) -> Matcher:
    return Matcher(list(THRESHOLDS), list(LABELS), allow_low_quality_matches=allow_low_quality)


def reference_rule(overlaps: Tensor) -> Tensor:
    """What mmdet assigns, ``(G, R)`` -> ``(R,)`` as ``match``.

    Ground truths in order: the anchors of highest overlap become positive for a ground truth if
    that overlap is at least 0.3, whatever they were before.
    """
    assigned = match(rpn_matcher(allow_low_quality=False), overlaps)
    for truth, row in enumerate(overlaps):
        if row.numel() and row.max() >= LOW_QUALITY_IOU:
            assigned[row == row.max()] = truth + 1
    return assigned


@dataclass(frozen=True)
class RPNAssignment:
    """Detectron2's assignment beside the reference's, over anchors that both look at.

    Attributes:
        differing: number of anchors assigned differently.
        explained: the reference's assignment follows from mmdet's rule to the last anchor, and
            all that differ are best anchors of some ground truth for one of the two.
    """

    differing: int
    explained: bool

    @classmethod
    def compare(
        cls, matcher: Matcher, overlaps: Tensor, reference: Tensor, seen: Tensor
    ) -> RPNAssignment:
        """Compares Detectron2's ``matcher`` with the reference.

        Args:
            overlaps: ``(G, R)`` IoU with all anchors, which Detectron2 considers.
            reference: ``(R,)`` the reference's assignment, 1-based.
            seen: ``(R,)`` bool, anchors that the reference considers.
        """
        differs = (match(matcher, overlaps) != reference) & seen
        is_best = _is_best(overlaps, torch.ones_like(seen)) | _is_best(overlaps, seen)
        same_rule = torch.equal(reference_rule(overlaps[:, seen]), reference[seen])
        return cls(int(differs.sum()), same_rule and bool(is_best[differs].all()))


def _is_best(overlaps: Tensor, allowed: Tensor) -> Tensor:
    """``(R,)`` bool: no allowed anchor overlaps some ground truth more than this one."""
    if not overlaps.numel():
        return torch.zeros_like(allowed)
    allowed_overlaps = overlaps.masked_fill(~allowed, -1.0)
    return (allowed_overlaps == allowed_overlaps.amax(1, keepdim=True)).any(0)
