"""Unit-level comparison: single functions of the reference against ours or Detectron2's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from co_detr.parity import units_assignment, units_boxes, units_dino, units_transformer
from co_detr.parity.golden_file import flatten
from co_detr.parity.report import Report
from co_detr.parity.unit import Unit

CHECKS: dict[str, Callable[[Unit], None]] = {
    "ms_deform_attn_function": units_transformer.ms_deform_attn_function,
    "ms_deform_attn_module": units_transformer.ms_deform_attn_module,
    "ms_deform_attn_init": units_transformer.ms_deform_attn_init,
    "sine_pe": units_transformer.sine_pe,
    "mask_resize": units_transformer.mask_resize,
    "valid_ratios_wh": units_transformer.valid_ratios_wh,
    "get_reference_points": units_transformer.get_reference_points,
    "gen_encoder_output_proposals": units_transformer.gen_encoder_output_proposals,
    "get_proposal_pos_embed": units_transformer.get_proposal_pos_embed,
    "inverse_sigmoid": units_transformer.inverse_sigmoid_unit,
    "linear_sum_assignment": units_assignment.linear_sum_assignment,
    "hungarian_assigner": units_assignment.hungarian_assigner,
    "anchors": units_assignment.anchors,
    "valid_flags": units_assignment.valid_flags,
    "atss_assigner": units_assignment.atss_assigner,
    "max_iou_assigner": units_assignment.max_iou_assigner,
    "giou": units_boxes.giou,
    "focal": units_boxes.focal,
    "delta_coder": units_boxes.delta_coder,
    "centerness_target": units_boxes.centerness_target,
    "roi_extractor": units_boxes.roi_extractor,
    "batched_nms": units_boxes.batched_nms_unit,
    "dino_sineembed_for_position": units_dino.sine_of_boxes,
    "qfl": units_dino.quality_focal_loss,
    "soft_nms": units_dino.soft_nms_unit,
    "dn_generator": units_dino.denoising_queries,
    "co_dino_decoder": units_dino.decoder,
}


def check_units(entries: dict[str, Any], report: Report) -> None:
    """Compares the content of a ``units.pt``, or of any subset of it.

    Args:
        entries: unit name -> dict, or list of dicts, of inputs and expected outputs.
        report: an empty one; an entry that no check looks at is a failure in it.
    """
    report.entries = flatten(entries)
    for name, content in entries.items():
        if name in CHECKS:
            listed = isinstance(content, list)
            for index, entry in enumerate(content if listed else [content]):
                unit = Unit(report, f"{name}[{index}]" if listed else name, entry)
                with report.part(unit.name):
                    CHECKS[name](unit)
    report.finish()
