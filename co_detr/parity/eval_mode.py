"""Compares the ``eval`` entries of a case: features, memory, proposals, decoder, detections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from co_detr.modeling import CoDETR
from co_detr.modeling.encoder import reference_points
from co_detr.modeling.postprocess import padding_mask
from co_detr.modeling.queries.two_stage import propose_grid
from co_detr.parity import tolerances as tol
from co_detr.parity.case import Case
from co_detr.parity.detections import compare_detections, compare_proposals
from co_detr.parity.report import Report
from co_detr.structures import EncoderMemory, QuerySet


class Capture:
    """Keeps the outputs of modules, in call order, while its ``with`` block runs."""

    def __init__(self, *modules: torch.nn.Module):
        self.modules = modules
        self.outputs: list[Tensor] = []

    def __enter__(self) -> Capture:
        self._hooks = [
            module.register_forward_hook(lambda _m, _i, output: self.outputs.append(output))
            for module in self.modules
        ]
        return self

    def __exit__(self, *exc) -> None:
        for hook in self._hooks:
            hook.remove()


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
        _check_queries(report, model, memory)
    with report.part("eval detections"):
        compare_detections(report, "eval.det_no_nms", model.detect(images))
        _check_rescaled(report, case, model.detect(images))
    with report.part("eval auxiliary heads"):
        _check_heads(report, case, model, images, model.auxiliary.pyramid(memory))


def _check_features(report: Report, case: Case, model: CoDETR, images: ImageList) -> None:
    if not case.has_backbone:
        report.given("eval.neck_feats", "stands in for backbone and neck, whose weights are absent")
        return
    backbone = model.backbone
    features = backbone.bottom_up(images.tensor)
    report.close("eval.backbone_feats", [features[f] for f in backbone.in_features], tol.MAP)
    report.close("eval.neck_feats", list(backbone(images.tensor).values()), tol.MAP)


def _check_memory(report: Report, model: CoDETR, memory: EncoderMemory, images: ImageList) -> None:
    mask = padding_mask(images.image_sizes, images.tensor.shape, images.tensor.device)
    masks = [F.interpolate(mask[:, None].float(), size=s)[:, 0].bool() for s in memory.level_shapes]
    flat = memory.padding_mask.split([height * width for height, width in memory.level_shapes], 1)
    levels = zip(flat, memory.level_shapes, strict=True)
    report.exact("eval.masks", [level.unflatten(1, shape) for level, shape in levels])
    encodings = [model.encoder.position_encoding(each) for each in masks]
    report.close("eval.pos_encodings", encodings, tol.GEOMETRY)
    report.close("eval.valid_ratios", memory.valid_ratios, tol.GEOMETRY)
    grid = reference_points(memory.level_shapes, memory.valid_ratios)
    report.close("eval.enc_reference_points", grid, tol.GEOMETRY)
    report.close("eval.encoder_levels", list(model.auxiliary.pyramid(memory).values()), tol.MAP)


def _check_queries(report: Report, model: CoDETR, memory: EncoderMemory) -> None:
    close, source = report.close, model.queries[0]
    box = tol.normalised_box(memory.image_sizes)
    output_memory, grid_logits = propose_grid(memory)
    output_memory = source.memory_norm(source.memory_proj(output_memory))
    close("eval.enc_output_memory", output_memory, tol.MAP)
    close("eval.enc_output_proposals_unact", grid_logits, tol.GEOMETRY)
    deltas = source.box_head(output_memory)
    close("eval.enc_reg_deltas_all", deltas, tol.LOGIT)
    close("eval.enc_coords_unact_all", deltas + grid_logits, tol.LOGIT)

    group = source(memory)
    proposals = group.proposals.predictions
    close("eval.enc_cls_logits_all", proposals.logits[0], tol.LOGIT)
    close("eval.enc_cls", proposals.logits[0], tol.LOGIT)
    close("eval.enc_boxes_cxcywh", proposals.boxes[0], box)
    _check_ranking(report, proposals.logits[0, ..., 0], group.num_queries)
    close("eval.init_reference", group.reference, box)
    with Capture(*model.decoder.layers) as hidden:
        predictions = model.decoder(QuerySet.concat([group]), memory)
    close("eval.decoder_hs", torch.stack(hidden.outputs).transpose(1, 2), tol.MAP)
    # Each layer's prediction is also the (undetached) reference of the next layer.
    close("eval.inter_references", predictions.boxes, box)
    close("eval.boxes_cxcywh", predictions.boxes, box)
    close("eval.cls_logits", predictions.logits, tol.LOGIT)


def _check_ranking(report: Report, scores: Tensor, number: int) -> None:
    """The chosen tokens, best first.

    Tokens that cannot propose all have the very same score and the same box; among these any
    order will do.
    """
    name = "eval.topk_indices"
    ours = scores.topk(number, dim=1).indices
    reference = report.entries.get(name, ours)
    if reference.shape == ours.shape:
        tied = scores.gather(1, reference) == scores.gather(1, ours)
        is_set = all(len(row.unique()) == number for row in reference)
        ours = torch.where(tied & is_set, reference, ours)
    report.exact(name, ours)


def _check_rescaled(report: Report, case: Case, detections: list[Instances]) -> None:
    """Boxes in the pixels of the original image."""
    rescaled = []
    for found, scale in zip(detections, case.own["scale_factors_wh"], strict=True):
        boxes = Boxes(found.pred_boxes.tensor / torch.as_tensor(scale))
        rescaled.append(
            Instances(
                found.image_size,
                pred_boxes=boxes,
                scores=found.scores,
                pred_classes=found.pred_classes,
            )
        )
    compare_detections(report, "eval.det_no_nms_rescaled", rescaled)


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
    compare_detections(report, "eval.det_one_stage", atss.inference(images, pyramid))


def check_input(report: Report, case: Case, model: CoDETR) -> None:
    """Source pixels to network input: normalisation, padding and the sizes that are kept."""
    if "images_uint8_rgb" not in case.own:
        report.given("image_sizes_hw", "input")
        return
    images = model.preprocess([{"image": image} for image in case.own["images_uint8_rgb"]])
    report.given("images_uint8_rgb", "input")
    report.close("batch", images.tensor, tol.GEOMETRY)
    report.exact("image_sizes_hw", [list(size) for size in images.image_sizes])
