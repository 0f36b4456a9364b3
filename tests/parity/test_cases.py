"""Whole models against the reference's cases, and the check against wrong cases."""

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.golden import COMPLETE, SHIPPED
from tests.parity.oracle.check import check_file
from tests.parity.oracle.golden import (
    golden_files,
    load_golden,
    save_golden,
)
from tests.parity.oracle.report import Report
from tests.parity.oracle.tolerances import REFERENCE_NAN, RPN_LOW_QUALITY, RPN_PADDING

CASES = [path for path in golden_files(SHIPPED) if path.name.startswith("case_")]
COMPLETE_FILES = golden_files(COMPLETE) if COMPLETE.is_dir() else []
BASE = SHIPPED / "case_A_compact.pt.xz"
EMPTY = SHIPPED / "case_A_empty_compact.pt.xz"
# Entries that must really have been compared, by how the name of the file starts.
COMPARED = {
    "case_A.": 750,
    "case_A_compact": 500,
    "case_A_": 450,
    "case_B.": 800,
    "case_B_": 600,
    "case_M.": 1050,
    "case_M_": 700,
    "units": 220,
}


def statuses(report) -> Counter:
    return Counter(line.status for line in report.lines)


def failures(report) -> set[str]:
    return {line.name for line in report.failures}


@pytest.fixture
def changed(tmp_path: Path) -> Callable:
    """``(path, change) -> Report`` of the file's content after ``change(content)``."""

    def check(path: Path, change: Callable[[dict], object]):
        content = load_golden(path)
        change(content)
        target = tmp_path / path.name.removesuffix(".xz")
        save_golden(content, target)
        return check_file(target)

    return check


@cache
def report_of(path: Path) -> Report:
    """Of a file as it is."""
    return check_file(path)


def assert_agrees(path: Path) -> None:
    report = report_of(path)
    assert not [str(line) for line in report.failures]
    least = next(count for start, count in COMPARED.items() if path.name.startswith(start))
    assert statuses(report)["ok"] >= least
    assert {line.name for line in report.lines} >= set(report.entries)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_shipped_case_agrees_with_the_reference(path: Path):
    assert_agrees(path)


@pytest.mark.slow
@pytest.mark.skipif(not COMPLETE_FILES, reason="the complete golden set is not at hand")
@pytest.mark.parametrize("path", COMPLETE_FILES, ids=lambda path: path.name)
def test_complete_case_agrees_with_the_reference(path: Path):
    assert_agrees(path)


def test_only_named_differences_are_known():
    known = [line for line in report_of(BASE).lines if line.status == "known"]
    assert {line.name: line.difference for line in known} == {
        "train.rpn.assign[0].gt_inds_all": RPN_LOW_QUALITY,
        "train.rpn.assign[1].gt_inds_all": RPN_PADDING,
    }


def test_nan_of_the_reference_is_waived_for_the_step_with_zero_padding_only():
    report = report_of(SHIPPED / "case_A_zero_padding_compact.pt.xz")
    waived = {line.name for line in report.lines if line.difference is REFERENCE_NAN}
    assert all(name.startswith("train.") for name in waived)
    assert {"train.losses.loss_cls_aux0", "train.total_loss"} <= waived
    finite = [line for line in report.lines if line.name.startswith("train.grad_norms.rpn_head")]
    assert finite and all(line.status == "ok" for line in finite)


def put(holder: dict | list, key: str | int, place: tuple | int, value: float) -> None:
    """Changes one number of a tensor; other entries may be the same tensor, and stay."""
    holder[key] = holder[key].clone()
    holder[key][place] = value


@pytest.mark.slow
def test_each_wrong_entry_is_noticed_and_no_other(changed):
    def change(case: dict) -> None:
        evaluation, training = case["eval"], case["train"]
        put(evaluation, "boxes_cxcywh", (-1, 0, 0, 0), 0.123)
        put(evaluation["det_no_nms"][0], "labels", 5, 99)
        evaluation["test_proposals"][1][-1] = evaluation["test_proposals"][1][0]
        del evaluation["topk_indices"]
        evaluation["masks"].pop()
        put(training["aux"][0], "labels", (0, 0), 99)
        training["surprise"] = [torch.zeros(2), torch.zeros(2)]
        # Both tokens are labeled as objects; only their ground truths are exchanged.
        matched = training["hungarian"]["enc"][1]
        first, second = (matched > 0).nonzero()[:2]
        matched[first], matched[second] = matched[second].clone(), matched[first].clone()

    assert failures(changed(BASE, change)) == {
        "eval.boxes_cxcywh",
        "eval.det_no_nms[0].labels",
        "eval.test_proposals[1]",
        "eval.topk_indices",
        "eval.masks[3]",
        "train.aux[0].labels",
        "train.surprise[0]",
        "train.surprise[1]",
        "train.hungarian.enc[1]",
    }


@pytest.mark.slow
def test_a_wrong_weight_is_noticed(changed):
    def change(case: dict) -> None:
        name = "query_head.transformer.decoder.layers.1.ffns.0.layers.1.weight"
        case["state_dict"][name][0, 0] += 1e-2

    found = failures(changed(BASE, change))
    assert {"eval.cls_logits", "train.aux[1].cls_logits", "train.cls_logits"} <= found
    assert not {"eval.enc_cls", "train.losses.d0.loss_cls"} & found


def test_nan_of_ours_is_noticed(changed):
    def change(case: dict) -> None:
        case["state_dict"]["query_head.cls_branches.1.bias"][0] = torch.nan

    report = changed(BASE, change)
    found = failures(report)
    assert {"eval.cls_logits", "train.losses.d1.loss_cls", "train.total_loss"} <= found
    assert statuses(report)["known"] == 2


@pytest.mark.slow
def test_nan_of_the_reference_needs_a_reason(changed):
    def change(case: dict) -> None:
        case["train"]["losses"]["loss_cls_aux0"] = torch.nan
        case["train"]["aux"][1]["cls_logits"][0, 0, 0, 0] = torch.nan
        case["train"]["grad_norms"]["query_head.query_embedding.weight"] = torch.nan

    assert failures(changed(BASE, change)) == {
        "train.losses.loss_cls_aux0",
        "train.aux[1].cls_logits",
        "train.grad_norms.query_head.query_embedding.weight",
    }


def test_unexpected_draws_are_noticed(changed):
    def change(case: dict) -> None:
        case["train"]["aux_randperms"].append(torch.arange(7))

    draws = {f"train.aux_randperms[{index}]" for index in range(3)}
    assert failures(changed(BASE, change)) == draws


@pytest.mark.slow
def test_what_stops_a_part_fails_its_entries_and_no_others(changed):
    def change(case: dict) -> None:
        case["train"]["roi"]["sampling"][0]["pos_inds"] += 10_000

    report = changed(BASE, change)
    assert "<check of train.roi>" in failures(report)
    assert not [name for name in failures(report) if name.startswith(("eval.", "train.atss"))]


def test_an_unknown_kind_is_listed_entry_by_entry(changed):
    report = changed(EMPTY, lambda case: case["meta"].update(kind="C"))
    assert {line.status for line in report.lines} == {"FAIL"}
    assert {line.name for line in report.lines} >= set(report.entries)


def test_a_missing_base_case_is_named(changed):
    report = changed(EMPTY, lambda case: case["meta"].update(base_case="elsewhere"))
    assert any("case_elsewhere.pt" in line.note for line in report.failures)


@pytest.mark.slow
@pytest.mark.skipif(not COMPLETE_FILES, reason="the complete golden set is not at hand")
def test_each_wrong_entry_of_co_dino_is_noticed_and_no_other(changed):
    def change(case: dict) -> None:
        evaluation, noise = case["eval"], case["train"]["dn"]
        put(evaluation, "references", (1, 0, 0, 0), 0.123)
        put(evaluation["det_soft_nms"][1], "boxes_scores", (3, 4), 0.5)
        put(evaluation, "enc_topk_cls", (1, 2, 3), 5.0)
        put(noise, "noised_labels_padded", (0, 0), 6 - noise["noised_labels_padded"][0, 0])
        put(noise, "input_query_bbox_unact", (1, 0, 2), 1.0)
        put(noise, "attn_mask", (0, 0), True)
        put(case["train"]["aux"][0], "feats", (0, 0, 0), 9.0)
        case["train"]["losses"]["d1.dn_loss_cls"] *= 1.001
        case["train"]["grad_norms"]["query_head.label_embedding.weight"] *= 1.1

    assert failures(changed(COMPLETE / "case_B.pt", change)) == {
        "eval.references",
        "eval.det_soft_nms[1].boxes_scores",
        "eval.enc_topk_cls",
        "train.dn.noised_labels_padded",
        "train.dn.input_query_bbox_unact",
        "train.dn.attn_mask",
        "train.aux[0].feats",
        "train.losses.d1.dn_loss_cls",
        "train.grad_norms.query_head.label_embedding.weight",
    }


@pytest.mark.slow
@pytest.mark.skipif(not COMPLETE_FILES, reason="the complete golden set is not at hand")
def test_other_noise_is_noticed(changed):
    def change(case: dict) -> None:
        put(case["train"]["dn"]["raw_draws"], "box_uniform", (7, 2), 0.0)

    found = failures(changed(COMPLETE / "case_B.pt", change))
    assert {"train.dn.input_query_bbox_unact", "train.losses.dn_loss_bbox"} <= found
    assert not {"train.dn.noised_labels_flat", "train.losses.loss_bbox"} & found
