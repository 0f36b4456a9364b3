"""Cases of the reference's instance segmentation hold less of the boxes' part than others.

What follows from the rest is made again here, so that the same step can be fed and compared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Entries of a training step that other cases have.
LEFT_OUT = (
    "train.rpn.objectness",
    "train.rpn.deltas",
    "train.rpn.anchors",
    "train.rpn.valid_flags",
    "train.rpn.targets",
    "train.roi.feats_mean",
    "train.roi.feats_first8",
    "train.roi.targets",
    "train.atss.cls_logits",
    "train.atss.bbox_deltas",
    "train.atss.centerness",
    "train.atss.anchors",
    "train.atss.valid_flags",
    "train.atss.targets",
    "train.atss.centerness_inputs",
    "train.atss.centerness_targets",
    *(
        f"train.{name}"
        for i in range(2)
        for name in (
            f"rpn.assign[{i}].max_overlaps_all",
            f"roi.sampling[{i}].neg_bboxes",
            f"atss.assign[{i}].max_overlaps_all",
            f"aux[{i}].attn_masks",
            f"aux[{i}].decoder_hs",
        )
    ),
)

# And what files with a base case do not repeat.
LEFT_OUT_OF_VARIANTS = (
    "train.aux[0].feats",
    "train.aux[1].feats",
    "train.roi.cls_score",
    "train.roi.bbox_pred",
    "train.mask.stage_logits[2]",
)


def is_instance_case(own: dict[str, Any]) -> bool:
    return "mask" in own.get("train", {})


def completed(own: dict[str, Any]) -> dict[str, Any]:
    """A file's content with the targets of RPN and ROI head, and draws sorted by who drew them.

    Weights come in single precision and whole numbers as int64, as other files have them.
    """
    own = _as_others(own)
    train = own["train"]
    num_classes = own["meta"]["num_classes"]
    draws = list(train["randperms"])
    of_rpn = [_drawn(*pool) for pool in _rpn_pools(train)]
    rpn_draws = [draws.pop(0) for is_drawn in of_rpn if is_drawn]
    of_masks = [_drawn(*pool) for pool in sampling_pools(own, "mask")]
    mask_draws = [draws.pop(0) for is_drawn in of_masks if is_drawn]
    rpn = {**train["rpn"], "targets": _rpn_targets(train, list(rpn_draws))}
    roi = {**train["roi"], "targets": _roi_targets(train["roi"], num_classes)}
    aux = [{**entry, "attn_masks": None} for entry in train["aux"]]
    added = {
        "rpn": rpn,
        "roi": roi,
        "aux": aux,
        "aux_randperms": [*rpn_draws, *draws],
        # Of positives alone: which negatives are drawn does not matter.
        "mask_randperms": [
            draw
            for draw, number in zip(
                mask_draws, [i for i, is_drawn in enumerate(of_masks) if is_drawn], strict=True
            )
            if number % 2 == 0
        ],
    }
    # Variants have no gradients of their own.
    return {**own, "train": {"grads": {}, **train, **added}}


def _as_others(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_others(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_as_others(inner) for inner in value]
    if not isinstance(value, Tensor):
        return value
    types = {torch.float16: torch.float32, torch.int32: torch.int64}
    return value.to(types.get(value.dtype, value.dtype))


def _drawn(available: int, kept: int) -> bool:
    return available > kept


def _rpn_pools(train: dict[str, Any]) -> list[tuple[int, int]]:
    """(available, kept) of each image's positive anchors, then negative ones."""
    return [
        pool
        for assigned, sampled in zip(train["rpn"]["assign"], train["rpn"]["sampled"], strict=True)
        for pool in (
            (int((assigned["gt_inds_all"] > 0).sum()), sampled["num_pos"]),
            (int((assigned["gt_inds_all"] == 0).sum()), sampled["num_neg"]),
        )
    ]


def sampling_pools(own: dict[str, Any], part: str) -> list[tuple[int, int]]:
    """The same of boxes in ``train.<part>``, to whose positives ground truths belong."""
    entries = own["train"][part]
    return [
        pool
        for labels, assigned, sampled in zip(
            own["gt_labels"], entries["assign"], entries["sampling"], strict=True
        )
        for pool in (
            (int((assigned["gt_inds"] > 0).sum()) + len(labels), len(sampled["pos_inds"])),
            (int((assigned["gt_inds"] == 0).sum()), len(sampled["neg_inds"])),
        )
    ]


def _rpn_targets(train: dict[str, Any], draws: list[Tensor]) -> dict[str, Any]:
    """0 is an object in ``labels``; only what was sampled has a weight."""
    labels, weights, totals = [], [], [0, 0]
    for assigned, sampled in zip(train["rpn"]["assign"], train["rpn"]["sampled"], strict=True):
        found = assigned["gt_inds_all"]
        label, weight = torch.ones_like(found), torch.zeros(len(found))
        for index, (pool, number) in enumerate(
            ((found > 0, sampled["num_pos"]), (found == 0, sampled["num_neg"]))
        ):
            rows = pool.nonzero().squeeze(1)
            if _drawn(len(rows), number):
                rows = rows[draws.pop(0)[:number]]
            weight[rows] = 1.0
            if index == 0:
                label[rows] = 0
            totals[index] += max(number, 1)
        labels.append(label)
        weights.append(weight)
    per_cell = len(labels[0]) // sum(level[0, 0].numel() for level in train["encoder_levels"])
    counts = [per_cell * level[0, 0].numel() for level in train["encoder_levels"]]
    return {
        "labels": list(torch.stack(labels).split(counts, dim=1)),
        "label_weights": list(torch.stack(weights).split(counts, dim=1)),
        "num_total_pos": totals[0],
        "num_total_neg": totals[1],
    }


def _roi_targets(roi: dict[str, Any], num_classes: int) -> dict[str, Tensor]:
    """Of all sampled boxes, an image's positives first."""
    labels, boxes = [], []
    for sampled in roi["sampling"]:
        negatives = len(sampled["neg_inds"])
        labels += [sampled["pos_gt_labels"], torch.full((negatives,), num_classes)]
        boxes += [sampled["pos_gt_bboxes"].view(-1, 4), torch.zeros(negatives, 4)]
    return {"labels": torch.cat(labels), "bbox_targets": torch.cat(boxes)}
