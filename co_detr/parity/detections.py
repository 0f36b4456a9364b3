"""Compares lists of detections or proposals, whose near-equal scores may come in any order."""

from __future__ import annotations

import torch
from detectron2.structures import Instances
from torch import Tensor

from co_detr.parity import tolerances as tol
from co_detr.parity.compare import Deviation, match_rows
from co_detr.parity.report import Report

SAME_CLASS = 0.5


def compare_detections(report: Report, name: str, found: list[Instances]) -> None:
    """``pred_boxes``, ``scores`` and ``pred_classes`` of all images."""
    for image, each in enumerate(found):
        boxes, scores, classes = each.pred_boxes.tensor, each.scores, each.pred_classes
        _compare_one(report, f"{name}[{image}]", boxes, scores, classes)


def compare_proposals(report: Report, name: str, boxes: Tensor, scores: Tensor) -> None:
    """One entry ``(N, 5)`` of boxes and scores, row to row one to one, in any order."""
    rows = torch.cat([boxes, scores[:, None]], dim=1)
    expected = report.entries.get(name, rows)
    order = match_rows(expected, rows, tol.BOX_AND_SCORE)
    report.close(name, rows[order], tol.BOX_AND_SCORE, note=_moved(order))


def _compare_one(report: Report, name: str, boxes: Tensor, scores: Tensor, classes: Tensor) -> None:
    """Rows are matched by box, score and class; both lists being sorted, only rows of near-equal
    score can have changed places."""
    rows = torch.cat([boxes, scores[:, None], classes[:, None].float()], dim=1)
    expected = rows
    if f"{name}.boxes_scores" in report.entries and f"{name}.labels" in report.entries:
        labels = report.entries[f"{name}.labels"]
        expected = torch.cat([report.entries[f"{name}.boxes_scores"], labels[:, None].float()], 1)
    order = match_rows(expected, rows, (*tol.BOX_AND_SCORE, SAME_CLASS))
    note = _moved(order)
    report.close(f"{name}.boxes_scores", rows[order, :5], tol.BOX_AND_SCORE, note=note)
    report.exact(f"{name}.labels", classes[order])
    if report.has(f"{name}.boxes_scores") and not bool((scores[:-1] >= scores[1:]).all()):
        report.record(f"{name}.boxes_scores", Deviation(False), "sorted", "not sorted by score")


def _moved(order: Tensor) -> str:
    moved = int((order != torch.arange(len(order))).sum())
    return f"{moved} rows of near-equal score in other places" if moved else ""
