"""Compares denoising queries with the reference's; cases and units have the same entries."""

from __future__ import annotations

import torch
from torch import Tensor

from co_detr.parity import tolerances as tol
from co_detr.parity.compare import deviation
from co_detr.parity.noise import flat_slots
from co_detr.parity.report import Report
from co_detr.structures import QueryGroup, QuerySet

EMPTY = -1  # the reference's mark of a slot without a ground truth


def check_denoising(
    report: Report, name: str, groups: list[QueryGroup], labels: Tensor, num_gts: list[int]
) -> None:
    """``noised_labels_*``, ``input_query_*`` and ``attn_mask`` below ``name``.

    Args:
        groups: all that are decoded together; the denoising ones and the matched ones are found
            by what the former see.
        labels: that were embedded, of any shape that flattens to ``(B * pad,)``.
        num_gts: ground truths per image.
    """
    group = next(each for each in groups if each.sees)
    labels = labels.flatten()
    places = flat_slots(num_gts, group.num_blocks)
    report.exact(f"{name}.noised_labels_flat", labels[places])
    if report.has(f"{name}.noised_labels_padded"):  # units lack it
        padded = torch.full_like(labels, EMPTY)
        padded[places] = labels[places]
        report.exact(f"{name}.noised_labels_padded", padded.view(group.content.shape[:2]))
    report.exact(f"{name}.input_query_label", group.content)
    # Our decoder gets the boxes; their logits, in float64, are the reference's again.
    report.close(f"{name}.input_query_bbox_unact", group.reference.double().logit(), tol.LOGIT)
    _check_mask(report, f"{name}.attn_mask", groups, group)


def _check_mask(report: Report, name: str, groups: list[QueryGroup], denoising: QueryGroup) -> None:
    """The reference blocks where its mask is True, and puts denoising queries first."""
    queries = QuerySet.concat(groups)
    start, slots = 0, {}
    for group, size in zip(groups, queries.sizes, strict=True):
        slots[group.name] = torch.arange(start, start + size)
        start += size
    order = torch.cat([slots[denoising.name], *(slots[seen] for seen in denoising.sees)])
    blocked = ~queries.attend_mask[..., order[:, None], order]
    expected = report.entries.get(name)
    if blocked.ndim > 2 and expected is not None:  # one per image where some queries are padded
        expected = expected.expand_as(blocked)
        report.record(name, deviation(expected, blocked), "equal", "of every image")
        return
    report.exact(name, blocked)
