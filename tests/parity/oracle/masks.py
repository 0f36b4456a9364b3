"""Compares the mask head of the reference's instance segmentation: a training step, and detections.

What is compared is what the head computed inside the whole model. Targets, regions of the losses
and pasted masks are discrete, and equal to the pixel.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from pycocotools import mask as mask_utils
from torch import Tensor

from co_detr.checkpoint.official import rename_official
from co_detr.modeling import CoDETR
from co_detr.modeling.detectors import DECODER, InferencePass
from co_detr.modeling.geometry import ImageBatch
from co_detr.modeling.losses import iou
from co_detr.modeling.mask_losses import (
    enlarge,
    mask_iou_target,
    mask_targets,
    refine,
)
from co_detr.modeling.masks import RefineMaskHead, Regions
from co_detr.modeling.postprocess import in_output_resolution
from tests.parity.oracle import tolerances as tol
from tests.parity.oracle.eval_mode import compare_proposals
from tests.parity.oracle.golden import Case
from tests.parity.oracle.report import Deviation, Report, describe, match_rows
from tests.parity.oracle.training import MaskRun, TrainingRun

SIZES = RefineMaskHead.sizes
EVERY = 4  # row and column of the large semantic maps is kept


def check_mask_training(report: Report, prefix: str, run: TrainingRun) -> None:
    """All entries below ``<prefix>.mask``, and the encoder's output."""
    maps = [*run.output.memory.maps(), run.pyramid["p7"]]
    report.close(f"{prefix}.encoder_levels", maps, tol.MAP)
    name, masks = f"{prefix}.mask", run.masks
    with report.part(f"{name} boxes"):
        _check_proposals(report, name, run)
        _check_sampling(report, name, run)
        _check_regions(report, name, masks, run.model.mask_head)
    with report.part(f"{name} features"), torch.no_grad():
        _check_features(report, name, masks)
    with report.part(f"{name} losses"), torch.no_grad():
        _check_losses(report, name, run)
    with report.part(f"{name} gradients"):
        _check_gradients(report, prefix, run)


def _check_proposals(report: Report, name: str, run: TrainingRun) -> None:
    """The best pairs of all queries, denoising ones as well, whatever they overlap."""
    head, geometry = run.model.mask_head, run.output.memory.geometry
    predictions = run.model._proposals(run.output.groups, run.output.predictions)
    boxes, scores = head.sampler.propose(predictions, geometry)
    for image, (own, score) in enumerate(zip(boxes, scores, strict=True)):
        key = f"{name}.proposals[{image}]"
        compare_proposals(report, key, own, score)
        rows = torch.cat([own, score[:, None]], dim=1)
        order = match_rows(report.entries.get(key, rows), rows, tol.BOX_AND_SCORE)
        classes = predictions.logits.shape[-1]
        flat = predictions.logits[-1, image].float().sigmoid().flatten()
        labels = flat.topk(len(own)).indices % classes
        report.exact(f"{name}.proposal_labels[{image}]", labels[order])


def _check_sampling(report: Report, name: str, run: TrainingRun) -> None:
    """Indices into ground truths, then proposals; the reference's proposals are taken."""
    sampler = run.model.mask_head.sampler
    truths, entries = run.case.ground_truth(), run.entries["mask"]
    drawn = len(run.entries["mask_randperms"])
    for image, truth in enumerate(truths):
        proposals = entries["proposals"][image][:, :4]
        boxes, count = truth.gt_boxes.tensor, len(truth)
        usable = torch.ones(len(proposals), dtype=torch.bool)
        assigned = sampler.assign(boxes, proposals, usable)
        key = f"{name}.assign[{image}]"
        report.exact(f"{key}.gt_inds", assigned[count:] + 1)
        overlaps = iou(boxes[:, None], proposals[None])
        best = overlaps.amax(0) if count else overlaps.new_zeros(len(proposals))
        report.close(f"{key}.max_overlaps", best, tol.GEOMETRY)
        # mmdet marks background with -1 here.
        classes = torch.cat([truth.gt_classes, torch.tensor([-1])])
        report.exact(f"{key}.labels", classes[assigned[count:]])

        key, reference = f"{name}.sampling[{image}]", entries["sampling"][image]
        positives = (assigned >= 0).nonzero().squeeze(1)
        sample = run.masks.samples[image]
        rows = reference["pos_inds"].long()
        if drawn:  # the same draw from the same candidates, by what the step itself sampled
            chosen = torch.isin(rows, positives).all() and len(rows) == len(sample.boxes)
            found = Deviation(bool(chosen), 0.0 if chosen else inf, ratio=0.0 if chosen else inf)
            report.record(f"{key}.pos_inds", found, "equal", "of the recorded draw")
        else:
            report.exact(f"{key}.pos_inds", positives)
        # Negatives teach no mask; all that is known of them here is that they are no positives.
        negatives = set(reference["neg_inds"].tolist()) <= set(
            (assigned < 0).nonzero().squeeze(1).tolist()
        )
        found = Deviation(negatives, 0.0 if negatives else inf, ratio=0.0 if negatives else inf)
        report.record(f"{key}.neg_inds", found, "equal", "no positives; not used")
        report.exact(f"{key}.pos_assigned_gt_inds", sample.truths)
        report.close(f"{key}.pos_bboxes", sample.boxes, tol.BOX_PIXELS)
        report.exact(f"{key}.pos_is_gt", (rows < count).to(torch.uint8))
        report.close(f"{key}.pos_gt_bboxes", boxes[sample.truths], tol.GEOMETRY_PIXELS)
        report.exact(f"{key}.pos_gt_labels", truth.gt_classes[sample.truths])
    if run.masks.draws.remaining:
        report.fail(f"{name}.sampling", f"{len(run.masks.draws.remaining)} draws were not needed")


def _check_regions(report: Report, name: str, masks: MaskRun, head: RefineMaskHead) -> None:
    regions = masks.regions
    rois = torch.cat([regions.images[:, None].float(), regions.boxes], dim=1)
    report.close(f"{name}.rois", rois, tol.BOX_PIXELS)
    report.exact(f"{name}.roi_labels", regions.labels)
    report.exact(f"{name}.roi_levels", regions.levels)
    report.given(f"{name}.full_idx", "which regions are stored as a whole")


def _check_features(report: Report, name: str, masks: MaskRun) -> None:
    """Before, between and after the stages: of some regions, and the mean of all."""
    entries, outputs = report.entries, masks.outputs
    full = entries[f"{name}.full_idx"].long()
    pooled = masks.predictions.pooled
    # Of no region at all the dump has a mean of another shape.
    means = pooled.mean((2, 3)) if len(pooled) else pooled.flatten(1)
    report.close(f"{name}.roi_feats_mean", means, tol.MASK_FEATURE)
    report.close(f"{name}.roi_feats_full", pooled[full], tol.MASK_FEATURE)
    report.close(f"{name}.instance_feats_full", outputs["instance_convs"][full], tol.MASK_FEATURE)
    semantic = outputs["semantic_convs"]
    if report.has(f"{name}.semantic_feat_image0"):
        report.close(f"{name}.semantic_feat_image0", semantic[:1], tol.MASK_FEATURE)
    report.close(f"{name}.semantic_feat_norm", semantic.norm(), rtol=tol.MASK_LOSS)
    for stage in range(3):
        features = outputs[f"stages.{stage}"]
        key = f"{name}.stage{stage}_features_full"
        if report.has(key):
            kept = full[-len(entries[key]) :]
            report.close(key, features[kept], tol.MASK_LOGIT)
        if report.has(f"{name}.stage{stage}_features_mean"):
            report.close(
                f"{name}.stage{stage}_features_mean", features.mean((2, 3)), tol.MASK_LOGIT
            )
        key = f"{name}.stage{stage}_semantic"
        if report.has(key):
            step = 1 if stage == 2 else EVERY
            map_ = outputs[f"stages.{stage}.semantic_conv"][:, :, ::step, ::step]
            report.close(key, map_, tol.MASK_FEATURE)


def _check_losses(report: Report, name: str, run: TrainingRun) -> None:
    masks, head, entries = run.masks, run.model.mask_head, report.entries
    logits, full = masks.predictions.logits, entries[f"{name}.full_idx"].long()
    report.close(f"{name}.stage_logits", logits[:3], tol.MASK_LOGIT)
    if report.has(f"{name}.stage3_logits_before_upsample"):
        last = masks.outputs["logits.3"].squeeze(1)
        report.close(f"{name}.stage3_logits_before_upsample", last, tol.MASK_LOGIT)
        report.close(f"{name}.stage3_logits_full", logits[3][full], tol.MASK_LOGIT)
    means = [stage.mean((1, 2)) for stage in logits] if len(full) else []
    report.close(f"{name}.stage_logits_mean", means, tol.MASK_LOGIT)

    truth = run.case.ground_truth()
    gt_masks = [instances.gt_masks for instances in truth]
    targets = mask_targets(masks.samples, gt_masks, run.case.image_sizes, SIZES)
    report.exact(f"{name}.stage_targets", [mask.to(torch.uint8) for mask in targets.masks[:2]])
    for stage in (2, 3):
        report.exact(f"{name}.stage{stage}_target_rle", run_lengths(targets.masks[stage]))
    areas = [mask.sum((1, 2)) for mask in targets.masks] if len(full) else []
    report.exact(f"{name}.stage_targets_area", areas)

    criterion, scale = head.criterion, head.loss_weight
    report.exact(f"{name}.stage_weights", criterion.stage_weights)
    report.close(f"{name}.loss_weight", criterion.loss_weight * scale, rtol=1e-9)
    if report.has(f"{name}.stage_loss_unweighted"):
        stages = criterion.stages(logits, targets.masks)
        loss = sum(w * stage for w, stage in zip(criterion.stage_weights, stages, strict=True))
        found = [float(stage) for stage in stages]
        report.close(f"{name}.stage_loss_unweighted", found, rtol=tol.MASK_LOSS)
        report.close(f"{name}.sum_stage_weighted", loss, rtol=tol.MASK_LOSS)
        regions = criterion.regions(logits, targets.masks)
        previous = criterion.previous(logits)
        for stage, before in zip((2, 3), previous, strict=True):
            key = f"boundary_region_rle.stage{stage}"
            report.exact(f"{name}.{key}", run_lengths(regions[stage]))
            report.exact(f"{name}.prev_pred_rle.stage{stage}", run_lengths(before))
        counts = [int(regions[stage].sum()) for stage in (2, 3)]
        report.exact(f"{name}.boundary_region_count", counts)
    _close_loss(report, f"{name}.loss_mask", run.output.losses["mask_head.loss_mask"])
    _check_iou(report, f"{name}.iou", run, targets)


def _check_iou(report: Report, name: str, run: TrainingRun, targets) -> None:
    masks, head = run.masks, run.model.mask_head
    labels, scale = masks.regions.labels, head.loss_weight * head.iou_head.loss_weight
    report.close(f"{name}.loss_weight", scale, rtol=1e-9)
    loss = run.output.losses["mask_head.loss_mask_iou"]
    _close_loss(report, f"{name}.loss_mask_iou", loss)
    if report.has(f"{name}.loss_unweighted"):
        _close_loss(report, f"{name}.loss_unweighted", loss / scale)
    if not report.has(f"{name}.pred_all_classes"):
        return
    if report.has(f"{name}.pooled_pred_full"):
        full = report.entries[f"{name.removesuffix('.iou')}.full_idx"].long()
        masks28 = masks.predictions.logits[1][full].sigmoid()[:, None]
        report.close(f"{name}.pooled_pred_full", F.max_pool2d(masks28, 2), tol.MASK_LOGIT)
    predicted = masks.outputs["iou_head"]
    report.close(f"{name}.pred_all_classes", predicted, tol.MASK_IOU)
    own = predicted.gather(1, labels[:, None]).squeeze(1)
    report.close(f"{name}.pred_label", own, tol.MASK_IOU)
    report.close(f"{name}.area_ratio", targets.shares, tol.GEOMETRY)
    target = mask_iou_target(masks.predictions.logits[1], targets)
    report.close(f"{name}.targets", target, tol.GEOMETRY)
    report.exact(f"{name}.used", target > 0)


def _close_loss(report: Report, name: str, loss: Tensor) -> None:
    is_zero = report.entries.get(name) == 0
    report.close(name, loss, tol.ZERO_LOSS if is_zero else 0.0, 0.0 if is_zero else tol.MASK_LOSS)


def _check_gradients(report: Report, prefix: str, run: TrainingRun) -> None:
    """Of the losses of masks alone, and what all heads together give to the encoder's output."""
    name, masks = f"{prefix}.mask.grads_mask_only", run.masks
    report.given(f"{name}.note", "a remark")
    maps = replace(run.output.memory, tokens=masks.token_gradients).maps()
    norms = [level_map.norm().item() for level_map in maps]
    _close_norms(report, f"{name}.encoder_levels_norm", [*norms, None])
    entries = run.entries["mask"]["grads_mask_only"]
    for level, expected in enumerate(entries.get("encoder_levels", ())):
        key = f"{name}.encoder_levels[{level}]"
        if expected is None:
            report.exact(key, None if level >= len(maps) else maps[level])
        else:
            report.close(key, maps[level][: len(expected)], rtol=tol.MASK_GRADIENT)
    reached = set()
    for key, norm in entries["param_norms"].items():
        own = _official_gradient(run, key)
        reached |= set(rename_official({key: run.case.weights[key]}, run.model).state_dict)
        limit = tol.MASK_GRADIENT * max(norm, max(entries["param_norms"].values()) * 1e-7)
        report.close(f"{name}.param_norms.{key}", own.norm(), limit if norm else 0.0)
    others = [key for key, value in masks.gradients.items() if key not in reached and value.any()]
    found = Deviation(not others, float(len(others)), ratio=float(len(others)))
    report.derived(f"<parameters in {name}>", found, "equal", ", ".join(others[:5]))
    for key, expected in entries.get("params", {}).items():
        limit = tol.MASK_GRADIENT_ENTRY if expected.any() else 0.0
        report.close(f"{name}.params.{key}", _official_gradient(run, key), rtol=limit)

    tokens, coarsest = masks.head_gradients
    # The dump took the gradient of the mask losses first, and so has it twice.
    maps = replace(run.output.memory, tokens=tokens + masks.token_gradients).maps()
    norms = [level_map.norm().item() for level_map in (*maps, coarsest)]
    name = f"{prefix}.grad_encoder_levels_norm"
    _close_norms(report, name, norms, "that of the mask losses counts twice in the dump")


def _close_norms(report: Report, name: str, ours: list[float | None], note: str = "") -> None:
    """A list of numbers, which is one entry; None where nothing flows."""
    expected = report.entries.get(name, ours)
    same = [value is None for value in expected] == [value is None for value in ours]
    worst = max(
        (
            abs(own - value) / (value or tol.ZERO_LOSS)
            for own, value in zip(ours, expected, strict=False)
            if own is not None and value is not None
        ),
        default=0.0,
    )
    ratio = worst / tol.MASK_GRADIENT
    found = Deviation(same and ratio <= 1, relative=worst, ratio=ratio)
    report.record(name, found, describe(0.0, tol.MASK_GRADIENT), note)


def _official_gradient(run: TrainingRun, key: str) -> Tensor:
    """Ours of a parameter by its official name, in its shape; rewritten ones do not occur."""
    (name,) = rename_official({key: run.case.weights[key]}, run.model).state_dict
    return run.masks.gradients[name]


def run_lengths(masks: Tensor) -> list[str]:
    """COCO's compressed strings of ``(N, H, W)`` bool."""
    columns = np.asfortranarray(masks.numpy().astype(np.uint8).transpose(1, 2, 0))
    return [code["counts"].decode() for code in mask_utils.encode(columns)] if len(masks) else []


@torch.no_grad()
def check_mask_eval(report: Report, case: Case, model: CoDETR) -> None:
    """Image by image, as the reference has it: in the network's pixels and in those of the file."""
    for prefix in ("eval", "eval_rescaled"):
        for image, entries in enumerate(case.own[prefix]):
            with report.part(f"{prefix}[{image}]"):
                _check_image(report, f"{prefix}[{image}]", case, model, image, entries)


def _check_image(
    report: Report, name: str, case: Case, model: CoDETR, image: int, entries: dict
) -> None:
    height, width = case.image_sizes[image]
    pixels = case.base["batch"][image : image + 1, :, :height, :width]
    one_pass = InferencePass(model, ImageBatch(pixels, [(height, width)]))
    (found,) = one_pass.with_masks(one_pass.detections(DECODER), [(height, width)])
    boxes = found.pred_boxes.tensor.clone()  # the others are scaled in place
    report.given(f"{name}.scale_factor", "input")
    report.given(f"{name}.ori_shape_hw", "input")
    head, memory = model.mask_head, one_pass._memory
    maps = memory.maps()
    if report.has(f"{name}.encoder_levels"):
        report.close(f"{name}.encoder_levels", maps, tol.MAP)

    original = tuple(int(side) for side in entries["ori_shape_hw"])
    sample = {"image": pixels[0], "height": original[0], "width": original[1]}
    final = in_output_resolution(found, sample)
    order = _order(report, name, final)
    final, boxes = final[order], boxes[order]
    rows = torch.cat([final.pred_boxes.tensor, final.scores[:, None]], dim=1)
    report.close(f"{name}.boxes_scores", rows, tol.BOX_AND_SCORE)
    report.exact(f"{name}.labels", final.pred_classes)
    rois = torch.cat([torch.zeros(len(boxes), 1), boxes], dim=1)
    report.close(f"{name}.rois", rois, tol.BOX_PIXELS)
    levels = head.levels(boxes)
    report.exact(f"{name}.roi_levels", levels)

    regions = Regions(boxes, final.pred_classes, torch.zeros(len(boxes), dtype=torch.long), levels)
    predicted = head(maps, regions)
    ious = head.iou_head(predicted)
    report.close(f"{name}.iou_all_classes", ious, tol.MASK_IOU)
    own = ious.gather(1, final.pred_classes[:, None]).squeeze(1)
    report.close(f"{name}.iou_label", own, tol.MASK_IOU)
    report.close(f"{name}.final_scores", final.mask_scores, tol.MASK_IOU)
    _check_refinement(report, name, predicted)
    _check_pasted(report, name, final, entries)


def _order(report: Report, name: str, found: Instances) -> Tensor:
    """The places of our detections in the reference's list, where near-equal scores may swap."""
    rows = torch.cat([found.pred_boxes.tensor, found.scores[:, None]], dim=1)
    rows = torch.cat([rows, found.pred_classes[:, None].float()], dim=1)
    expected = rows
    if report.has(f"{name}.labels"):
        labels = report.entries[f"{name}.labels"][:, None].float()
        expected = torch.cat([report.entries[f"{name}.boxes_scores"], labels], dim=1)
    return match_rows(expected, rows, (*tol.BOX_AND_SCORE, 0.5))


def _check_refinement(report: Report, name: str, predicted) -> None:
    raw = predicted.logits
    refined = [raw[0], raw[1], refine(raw[:3]), refine(raw)]
    means = [stage.mean((1, 2)) for stage in raw]
    report.close(f"{name}.stage_logits_raw_mean", means, tol.MASK_LOGIT)
    means = [stage.mean((1, 2)) for stage in refined]
    report.close(f"{name}.stage_logits_refined_mean", means, tol.MASK_LOGIT)
    changed = [int((own != before).sum()) for own, before in zip(refined, raw, strict=True)]
    report.exact(f"{name}.refined_changed_pixels", changed)
    if not report.has(f"{name}.full_idx"):
        return
    report.given(f"{name}.full_idx", "which detections are stored as a whole")
    full = report.entries[f"{name}.full_idx"].long()
    report.close(f"{name}.roi_feats_full", predicted.pooled[full[-1:]], tol.MASK_FEATURE)
    report.close(f"{name}.stage_logits_raw_full", [e[full] for e in raw[:3]], tol.MASK_LOGIT)
    before = f"{name}.stage3_logits_raw_before_upsample"
    # Enlarging it gives ours, whose corners it has.
    expected = enlarge(report.entries[before][:, None]).squeeze(1)
    error = (expected - raw[3][full]).abs().max().item()
    found = Deviation(error <= tol.MASK_LOGIT, error, ratio=error / tol.MASK_LOGIT)
    report.record(before, found, describe(tol.MASK_LOGIT), "compared when enlarged")
    for stage in (2, 3):
        key = f"{name}.stage_logits_refined_full.stage{stage}"
        report.close(key, refined[stage][full], tol.MASK_LOGIT)


def _check_pasted(report: Report, name: str, final: Instances, entries: dict) -> None:
    """Every mask in the image, to the pixel."""
    report.exact(f"{name}.mask_size_hw", list(final.image_size))
    size = [int(side) for side in entries["mask_size_hw"]]
    ours = final.pred_masks.tensor
    wrong = 0
    for own, counts in zip(ours, entries["mask_rle_counts"], strict=True):
        expected = mask_utils.decode({"size": size, "counts": counts})
        wrong += int((own.numpy() != expected.astype(bool)).sum())
    ratio = wrong / tol.MASK_PIXELS
    note = f"{wrong} of {ours.numel()} pixels differ"
    found = Deviation(ratio <= 1, float(wrong), ratio=ratio)
    report.record(f"{name}.mask_rle_counts", found, describe(tol.MASK_PIXELS), note)
    report.close(f"{name}.mask_area", ours.sum((1, 2)), tol.MASK_PIXELS)
