"""Compares the ``eval`` entries of a case: features, memory, proposals, decoder, detections.

Lists of detections and denoising queries have the same entries elsewhere, and are compared there by
the functions here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from co_detr.modeling import CoDETR
from co_detr.modeling.postprocess import TopKPostprocessor
from co_detr.modeling.queries.sources import propose_grid
from co_detr.modeling.transformer import inverse_sigmoid
from co_detr.structures import EncoderMemory, QueryGroup, QuerySet
from tests.parity.oracle import tolerances as tol
from tests.parity.oracle.golden import Case
from tests.parity.oracle.model import Capture, decoder_states
from tests.parity.oracle.report import Deviation, Report, deviation, match_rows
from tests.parity.oracle.training import flat_slots

SAME_CLASS = 0.5
EMPTY = -1  # the reference's mark of a slot without a ground truth


@torch.no_grad()
def check_eval(report: Report, case: Case, model: CoDETR) -> None:
    """Runs ``model`` (in eval mode) part by part on the case's input."""
    images = case.images()
    with report.part("eval features"):
        _check_features(report, case, model, images)
    memory = model.encode(images)
    with report.part("eval memory"):
        _check_memory(report, model, memory, images)
    with report.part("eval queries"):
        check_decoder(report, "eval", model, memory)
    with report.part("eval detections"):
        _check_detections(report, case, model, images)
    with report.part("eval auxiliary heads"):
        _check_heads(report, case, model, images, model.auxiliary.pyramid(memory))


def _check_features(report: Report, case: Case, model: CoDETR, images: ImageList) -> None:
    if not case.has_backbone:
        report.given("eval.neck_feats", "stands in for backbone and neck, whose weights are absent")
        return
    backbone = model.backbone
    features = backbone.bottom_up(images.tensor)
    maps = [features[f] for f in backbone.in_features]
    report.close("eval.backbone_feats", maps, tol.MAP, tol.BACKBONE)
    report.close("eval.neck_feats", list(backbone(images.tensor).values()), tol.MAP)


def _check_memory(report: Report, model: CoDETR, memory: EncoderMemory, images: ImageList) -> None:
    mask = memory.geometry.padding_mask
    masks = [F.interpolate(mask[:, None].float(), size=s)[:, 0].bool() for s in memory.level_shapes]
    flat = memory.padding_mask.split([height * width for height, width in memory.level_shapes], 1)
    levels = zip(flat, memory.level_shapes, strict=True)
    report.exact("eval.masks", [level.unflatten(1, shape) for level, shape in levels])
    encodings = [model.encoder.position_encoding(mask) for mask in masks]
    report.close("eval.pos_encodings", encodings, tol.GEOMETRY)
    report.close("eval.valid_ratios", memory.valid_ratios, tol.GEOMETRY)
    grid = memory.levels.reference_points()
    report.close("eval.enc_reference_points", grid, tol.GEOMETRY)
    report.close("eval.encoder_levels", list(model.auxiliary.pyramid(memory).values()), tol.MAP)


def check_decoder(report: Report, prefix: str, model: CoDETR, memory: EncoderMemory) -> None:
    """Encoder proposals and all that is decoded from the best of them, below ``prefix``."""
    close, source = report.close, model.queries["matching"]
    box = tol.normalized_box(memory.image_sizes)
    output_memory, grid_logits = propose_grid(memory)
    output_memory = source.memory_norm(source.memory_proj(output_memory))
    close(f"{prefix}.enc_output_memory", output_memory, tol.MAP)
    close(f"{prefix}.enc_output_proposals_unact", grid_logits, tol.GEOMETRY)
    deltas = source.box_head(output_memory)
    close(f"{prefix}.enc_reg_deltas_all", deltas, tol.LOGIT)
    close(f"{prefix}.enc_coords_unact_all", deltas + grid_logits, tol.LOGIT)
    logits = source.class_head(output_memory)
    close(f"{prefix}.enc_cls_logits_all", logits, tol.LOGIT)
    can_propose = grid_logits.isfinite().all(-1)
    is_dino = source.ranking == "best_class"
    scores = logits.amax(-1) if is_dino else logits[..., 0]
    _check_ranking(report, f"{prefix}.topk_indices", scores, can_propose, source.num_queries)

    group = source(memory)
    proposals = group.proposals.predictions
    # The chosen tokens of Co-DINO, all tokens of Co-Deformable-DETR.
    which = "enc_topk" if is_dino else "enc"
    close(f"{prefix}.{which}_cls", proposals.logits[0], tol.LOGIT)
    close(f"{prefix}.{which}_boxes_cxcywh", proposals.boxes[0], box)
    with decoder_states(model) as states, Capture(*model.decoder.layers) as layers:
        predictions = model.decoder(QuerySet.concat([group]), memory)
    close(f"{prefix}.decoder_hs", torch.stack(states.outputs).transpose(1, 2), tol.MAP)
    if is_dino:
        close(f"{prefix}.references", _references(model, group.reference, layers.outputs), box)
    else:
        close(f"{prefix}.init_reference", group.reference, box)
        # Each layer's prediction is also the (undetached) reference of the next layer.
        close(f"{prefix}.inter_references", predictions.boxes, box)
    close(f"{prefix}.boxes_cxcywh", predictions.boxes, box)
    close(f"{prefix}.cls_logits", predictions.logits, tol.LOGIT)


def _references(model: CoDETR, reference: Tensor, states: list[Tensor]) -> Tensor:
    """The first references and those that Co-DINO refines from every layer's plain output."""
    references, decoder = [reference], model.decoder
    for state, box_head in zip(states, decoder.box_heads, strict=True):
        start = inverse_sigmoid(references[-1], decoder.eps)
        references.append((box_head(state) + start).sigmoid())
    return torch.stack(references)


def _check_ranking(
    report: Report, name: str, scores: Tensor, can_propose: Tensor, number: int
) -> None:
    """The chosen tokens, best first.

    Tokens that cannot propose all have the very same score and the same box; among these any
    order will do.
    """
    ours = scores.topk(number, dim=1).indices
    reference = report.entries.get(name, ours)
    if reference.shape == ours.shape:
        tied = scores.gather(1, reference) == scores.gather(1, ours)
        # Rounding may depend on a token's place.
        tied |= ~(can_propose.gather(1, reference) | can_propose.gather(1, ours))
        is_set = all(len(row.unique()) == number for row in reference)
        ours = torch.where(tied & is_set, reference, ours)
    report.exact(name, ours)


def _check_detections(report: Report, case: Case, model: CoDETR, images: ImageList) -> None:
    """Of the model as it is, and of Co-DINO also without soft-NMS."""
    memory = model.encode(images)
    predictions = (*model.decode(memory), memory.geometry)
    found = model.postprocessor(*predictions)
    if case.is_dino:
        _compare_both_sizes(report, case, "eval.det_soft_nms", found)
        found = TopKPostprocessor(case.max_detections)(*predictions)
    _compare_both_sizes(report, case, "eval.det_no_nms", found)


def _compare_both_sizes(report: Report, case: Case, name: str, found: list[Instances]) -> None:
    """In the pixels of the network input and in those of the original image."""
    compare_detections(report, name, found)
    rescaled = []
    for instances, scale in zip(found, case.own["scale_factors_wh"], strict=True):
        boxes = Boxes(instances.pred_boxes.tensor / torch.as_tensor(scale))
        fields = dict(scores=instances.scores, pred_classes=instances.pred_classes)
        rescaled.append(Instances(instances.image_size, pred_boxes=boxes, **fields))
    compare_detections(report, f"{name}_rescaled", rescaled)


def _check_heads(
    report: Report, case: Case, model: CoDETR, images: ImageList, pyramid: dict[str, Tensor]
) -> None:
    """What the auxiliary heads detect by themselves."""
    roi, atss = (model.auxiliary.heads[name] for name in ("roi", "atss"))
    proposals, _ = roi.rpn(images, pyramid)
    for image, found in enumerate(proposals):
        boxes, scores = found.proposal_boxes.tensor, found.objectness_logits.sigmoid()
        compare_proposals(report, f"eval.test_proposals[{image}]", boxes, scores)
    # Equal scores may come in any order, so the second stage gets the reference's proposals.
    given = [
        Instances(size, proposal_boxes=Boxes(rows[:, :4]), objectness_logits=rows[:, 4].logit())
        for size, rows in zip(images.image_sizes, case.own["eval"]["test_proposals"], strict=True)
    ]
    detections, _ = roi.roi_heads(images, pyramid, given)
    compare_detections(report, "eval.det_two_stage", detections)
    compare_detections(report, "eval.det_one_stage", atss.detect(images, pyramid).instances)


def check_input(report: Report, case: Case, model: CoDETR) -> None:
    """Source pixels to network input: normalization, padding and the sizes that are kept."""
    if "images_uint8_rgb" not in case.own:
        report.given("image_sizes_hw", "input")
        return
    images = model.preprocess([{"image": image} for image in case.own["images_uint8_rgb"]])
    report.given("images_uint8_rgb", "input")
    report.close("batch", images.tensor, tol.GEOMETRY)
    report.exact("image_sizes_hw", [list(size) for size in images.image_sizes])


def compare_detections(report: Report, name: str, found: list[Instances]) -> None:
    """``pred_boxes``, ``scores`` and ``pred_classes`` of all images."""
    for image, instances in enumerate(found):
        boxes, scores, classes = (
            instances.pred_boxes.tensor,
            instances.scores,
            instances.pred_classes,
        )
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
    group = next(group for group in groups if group.sees)
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
