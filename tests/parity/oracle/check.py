"""Checks whole files: a case of the reference, or its unit-level goldens."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.parity.oracle import units_mask_head
from tests.parity.oracle.eval_mode import check_eval, check_input
from tests.parity.oracle.golden import Case, flatten, load_golden
from tests.parity.oracle.head_checks import check_atss, check_roi, check_rpn
from tests.parity.oracle.instance_case import is_instance_case
from tests.parity.oracle.masks import check_mask_eval, check_mask_training
from tests.parity.oracle.model import build_model
from tests.parity.oracle.report import Report, Unit
from tests.parity.oracle.tolerances import ROI_TRIM
from tests.parity.oracle.training import run_training
from tests.parity.oracle.training_checks import check_gradients, check_losses, check_queries
from tests.parity.oracle.units_heads import (
    anchors,
    atss_assigner,
    batched_nms_unit,
    centerness_unit,
    delta_coder,
    focal,
    giou,
    hungarian_assigner,
    linear_sum_assignment,
    max_iou_assigner,
    roi_extractor,
    valid_flags,
)
from tests.parity.oracle.units_masks import bitmap_ops, coco_rle, copy_paste
from tests.parity.oracle.units_transformer import (
    decoder,
    denoising_queries,
    gen_encoder_output_proposals,
    get_proposal_pos_embed,
    get_reference_points,
    inverse_sigmoid_unit,
    mask_resize,
    ms_deform_attn_function,
    ms_deform_attn_init,
    ms_deform_attn_module,
    quality_focal_loss,
    sine_of_boxes,
    sine_pe,
    soft_nms_unit,
    valid_ratios_wh,
)

KINDS = ("A", "B", "M")  # Co-Deformable-DETR, Co-DINO, Co-DINO-Inst
CHECKS: dict[str, Callable[[Unit], None]] = {
    "ms_deform_attn_function": ms_deform_attn_function,
    "ms_deform_attn_module": ms_deform_attn_module,
    "ms_deform_attn_init": ms_deform_attn_init,
    "sine_pe": sine_pe,
    "mask_resize": mask_resize,
    "valid_ratios_wh": valid_ratios_wh,
    "get_reference_points": get_reference_points,
    "gen_encoder_output_proposals": gen_encoder_output_proposals,
    "get_proposal_pos_embed": get_proposal_pos_embed,
    "inverse_sigmoid": inverse_sigmoid_unit,
    "linear_sum_assignment": linear_sum_assignment,
    "hungarian_assigner": hungarian_assigner,
    "anchors": anchors,
    "valid_flags": valid_flags,
    "atss_assigner": atss_assigner,
    "max_iou_assigner": max_iou_assigner,
    "giou": giou,
    "focal": focal,
    "delta_coder": delta_coder,
    "centerness_target": centerness_unit,
    "roi_extractor": roi_extractor,
    "batched_nms": batched_nms_unit,
    "dino_sineembed_for_position": sine_of_boxes,
    "qfl": quality_focal_loss,
    "soft_nms": soft_nms_unit,
    "dn_generator": denoising_queries,
    "co_dino_decoder": decoder,
}
# Of the reference's instance segmentation, in files of their own.
MASK_CHECKS: dict[str, Callable[[Unit], None]] = {
    "bitmap_ops": bitmap_ops,
    "coco_rle": coco_rle,
    "copy_paste": copy_paste,
    **units_mask_head.CHECKS,
}


def check_file(path: Path) -> Report:
    """Compares one golden file with our code.

    Every entry of the file is in the report, whatever happens; a file that cannot be read gives
    a report with one failure.
    """
    report = Report()
    with warnings.catch_warnings(), report.part(path.name):
        warnings.simplefilter("ignore")  # third-party deprecations would hide the report
        if path.name.startswith("case_"):
            _check_case(path, report)
        else:
            check_units(load_golden(path), report)
    report.finish()
    return report


def _check_case(path: Path, report: Report) -> None:
    own = load_golden(path)
    report.entries = flatten(own)
    kind = "M" if is_instance_case(own) else own["meta"]["kind"]
    if kind not in KINDS:
        raise ValueError(f"meta.kind is {kind!r}, but only {' and '.join(KINDS)} are known.")
    case = Case.of(own, path.parent)
    report.dropped = case.dropped
    report.given("meta", "describes the model")
    if "state_dict" in own:
        report.given("state_dict", "loaded through the converter")
    masks = kind == "M"
    for entry in ("gt_boxes_xyxy", "gt_labels"):
        report.given(entry, "input")
    for entry in ("gt_masks", "gt_polygons") if masks else ("scale_factors_wh",):
        report.given(entry, "input")
    model = build_model(case).eval()
    check_input(report, case, model)
    for part in ("eval", "train"):
        if part not in own:
            report.fail(part, "nothing to compare")  # unless a file of this sort has none
    if "eval" in own:
        (check_mask_eval if masks else check_eval)(report, case, model)
    for prefix in ("train", "train_finite"):
        if prefix in own:
            with report.part(prefix):
                _check_training(report, case, prefix)


def _check_training(report: Report, case: Case, prefix: str) -> None:
    # A second dump of the same step only repeats what differs from the first.
    entries = {**case.own["train"], **case.own[prefix]}
    run = run_training(case, build_model(case), entries)
    report.given(f"{prefix}.seed", "of the reference's draws")
    draws = f"{prefix}.randperms" if case.kind == "M" else f"{prefix}.aux_randperms"
    if run.draws.remaining:
        report.fail(draws, f"{len(run.draws.remaining)} draws were not needed here")
    else:
        trimmed = ROI_TRIM if run.draws.num_shorter else None
        report.given(draws, "replayed, each where it was drawn", trimmed)
    with report.part(f"{prefix}.aux"):
        check_queries(report, prefix, run)
    for part, check in (("rpn", check_rpn), ("roi", check_roi), ("atss", check_atss)):
        if prefix == "train" or part in case.own[prefix]:
            with report.part(f"{prefix}.{part}"):
                check(report, prefix, run)
    if run.masks is not None:
        check_mask_training(report, prefix, run)
    with report.part(f"{prefix}.losses"):
        check_losses(report, prefix, run)
    with report.part(f"{prefix}.grads"):
        check_gradients(report, prefix, run)


def check_units(entries: dict[str, Any], report: Report) -> None:
    """Compares the content of a ``units.pt``, or of any subset of it.

    Args:
        entries: unit name -> dict, or list of dicts, of inputs and expected outputs.
        report: an empty one; an entry that no check looks at is a failure in it.
    """
    report.entries = flatten(entries)
    checks = CHECKS | MASK_CHECKS
    for name, content in entries.items():
        if name in checks:
            listed = isinstance(content, list)
            for index, entry in enumerate(content if listed else [content]):
                unit = Unit(report, f"{name}[{index}]" if listed else name, entry, entries)
                with report.part(unit.name):
                    checks[name](unit)
    report.finish()
