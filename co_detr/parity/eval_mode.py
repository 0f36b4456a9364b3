"""Compares the ``eval`` entries of a case: features, memory, proposals, decoder, detections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, ImageList, Instances

from co_detr.modeling import CoDETR
from co_detr.modeling.encoder import reference_points
from co_detr.modeling.postprocess import padding_mask
from co_detr.modeling.queries.two_stage import propose_grid
from co_detr.parity import tolerances as tol
from co_detr.parity.case import Case
from co_detr.parity.report import Report
from co_detr.structures import QuerySet


class Capture:
    """Keeps the outputs of modules, in call order, while its ``with`` block runs."""

    def __init__(self, *modules: torch.nn.Module):
        self.modules = modules
        self.outputs: list[torch.Tensor] = []

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
    images = case.images(torch.float32)
    box = tol.normalised_box(images.image_sizes)
    backbone = model.backbone
    features = backbone.bottom_up(images.tensor)
    close = report.close
    close("eval.backbone_feats", [features[name] for name in backbone.in_features], tol.MAP)
    maps = list(backbone(images.tensor).values())
    close("eval.neck_feats", maps, tol.MAP)

    mask = padding_mask(images.image_sizes, images.tensor.shape, images.tensor.device)
    masks = [F.interpolate(mask[:, None].float(), size=m.shape[2:])[:, 0].bool() for m in maps]
    memory = model.encode(images)
    report.exact("eval.masks", masks)
    report.verdict(
        "eval.masks",
        torch.equal(memory.padding_mask, torch.cat([m.flatten(1) for m in masks], 1)),
        "the memory's flat mask is the same",
    )
    close("eval.pos_encodings", [model.encoder.position_encoding(m) for m in masks], tol.GEOMETRY)
    close("eval.valid_ratios", memory.valid_ratios, tol.GEOMETRY)
    grid = reference_points(memory.level_shapes, memory.valid_ratios)
    close("eval.enc_reference_points", grid, tol.GEOMETRY)
    pyramid = model.auxiliary.pyramid(memory)
    close("eval.encoder_levels", list(pyramid.values()), tol.MAP)
    _check_queries(report, model, memory, box)
    _check_detections(report, case, model, images, pyramid)


def _check_queries(report: Report, model: CoDETR, memory, box: float) -> None:
    close, source = report.close, model.queries[0]
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
    report.exact("eval.topk_indices", proposals.logits[0, ..., 0].topk(group.num_queries).indices)
    close("eval.init_reference", group.reference, box)
    with Capture(*model.decoder.layers) as hidden:
        predictions = model.decoder(QuerySet.concat([group]), memory)
    close("eval.decoder_hs", torch.stack(hidden.outputs).transpose(1, 2), tol.MAP)
    # Each layer's prediction is also the (undetached) reference of the next layer.
    close("eval.inter_references", predictions.boxes, box)
    close("eval.boxes_cxcywh", predictions.boxes, box)
    close("eval.cls_logits", predictions.logits, tol.LOGIT)


def _check_detections(
    report: Report, case: Case, model: CoDETR, images: ImageList, pyramid: dict
) -> None:
    detections = model.detect(images)
    _compare_detections(report, "eval.det_no_nms", detections)
    for image, (found, scale) in enumerate(
        zip(detections, case.own["scale_factors_wh"], strict=True)
    ):
        found = Instances(found.image_size, **found.get_fields())
        found.pred_boxes = Boxes(found.pred_boxes.tensor / torch.tensor(scale))
        _compare_one(report, f"eval.det_no_nms_rescaled[{image}]", found)

    roi, atss = (model.auxiliary.heads[name] for name in ("roi", "atss"))
    proposals, _ = roi.rpn(images, pyramid)
    for image, found in enumerate(proposals):
        rows = [found.proposal_boxes.tensor, found.objectness_logits.sigmoid()[:, None]]
        report.rows(f"eval.test_proposals[{image}]", torch.cat(rows, 1), tol.BOX_PIXELS)
    # Equal scores may come in any order, so the second stage gets the reference's proposals.
    given = [
        Instances(size, proposal_boxes=Boxes(rows[:, :4]), objectness_logits=rows[:, 4].logit())
        for size, rows in zip(images.image_sizes, case.own["eval"]["test_proposals"], strict=True)
    ]
    detections, _ = roi.roi_heads(images, pyramid, given)
    _compare_detections(report, "eval.det_two_stage", detections)
    _compare_detections(report, "eval.det_one_stage", atss.inference(images, pyramid))


def _compare_detections(report: Report, name: str, detections: list[Instances]) -> None:
    for image, found in enumerate(detections):
        _compare_one(report, f"{name}[{image}]", found)


def _compare_one(report: Report, name: str, found: Instances) -> None:
    rows = torch.cat([found.pred_boxes.tensor, found.scores[:, None]], dim=1)
    report.close(f"{name}.boxes_scores", rows, tol.BOX_PIXELS)
    reference = report.entries[f"{name}.boxes_scores"][:, 4]
    same = reference.shape == found.scores.shape
    worst = (reference - found.scores).abs().max().item() if same else float("inf")
    note = f"scores alone: {worst:.1e} abs, at most {tol.LOGIT:.1e}"
    report.verdict(f"{name}.boxes_scores", worst <= tol.LOGIT, note)
    report.exact(f"{name}.labels", found.pred_classes)
