"""Single functions against the reference's numbers, and the check against wrong numbers."""

import copy

import pytest

from tests.golden import load_units
from tests.parity.oracle.check import CHECKS, check_units
from tests.parity.oracle.report import Report
from tests.parity.oracle.tolerances import RPN_LOW_QUALITY


def check(entries: dict) -> Report:
    report = Report()
    check_units(entries, report)
    return report


def failures(entries: dict) -> list[str]:
    return [line.name for line in check(entries).failures]


@pytest.mark.parametrize("name", CHECKS)
def test_unit_agrees_with_the_reference(name):
    report = check({name: load_units()[name]})
    assert not [str(line) for line in report.failures]
    assert any(line.status == "ok" for line in report.lines)


def test_every_unit_is_accounted_for():
    assert set(load_units()) <= set(CHECKS)


def test_known_differences_are_only_the_named_ones():
    known = [line for line in check(load_units()).lines if line.status == "known"]
    assert {line.name: line.difference for line in known} == {
        "max_iou_assigner[1].gt_inds": RPN_LOW_QUALITY
    }


@pytest.mark.parametrize(
    ("unit", "key", "step"),
    [
        ("ms_deform_attn_module", "grad_value", 1e-6),
        ("atss_assigner", "gt_inds", 1),
        ("max_iou_assigner", "gt_inds", 1),
        ("roi_extractor", "output_first4", 1e-3),
        ("delta_coder", "decoded", 1.0),
        ("dn_generator", "input_query_bbox_unact", 1e-2),
        ("dn_generator", "noised_labels_flat", 1),
        ("qfl", "per_row", 1e-3),
        ("soft_nms", "keep", 1),
        ("batched_nms", "dets", 1e-2),
    ],
)
def test_a_wrong_number_is_noticed(unit, key, step):
    index = 1  # for max_iou_assigner, the element that differs by design
    entry = copy.deepcopy(load_units()[unit][index])
    entry[key].view(-1)[0] += step
    assert failures({unit: [entry]}) == [f"{unit}[0].{key}"]


def test_an_entry_that_nothing_compares_is_noticed():
    entry = {**load_units()["inverse_sigmoid"], "eps_1e_2": 0.0}
    assert failures({"inverse_sigmoid": entry}) == ["inverse_sigmoid.eps_1e_2"]
    assert failures({"new_unit": {"x": 0.0}}) == ["new_unit.x"]
