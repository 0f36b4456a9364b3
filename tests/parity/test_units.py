"""Single functions against the reference's numbers, and the check against wrong numbers."""

import copy

import pytest

from co_detr.parity.units import CHECKS, NOT_YET, check_units
from tests.golden import load_units


def failures(report) -> list[str]:
    return [str(line) for line in report.lines if line.status == "FAIL"]


@pytest.mark.parametrize("name", CHECKS)
def test_unit_agrees_with_the_reference(name):
    report = check_units({name: load_units()[name]})
    assert not failures(report)
    assert any(line.status == "ok" for line in report.lines)


def test_every_unit_is_accounted_for():
    assert set(load_units()) <= {*CHECKS, *NOT_YET}


def test_known_differences_are_only_the_named_ones():
    known = [line.name for line in check_units(load_units()).lines if line.status == "known"]
    assert known == ["max_iou_assigner[1].gt_inds"]


@pytest.mark.parametrize(
    ("unit", "key", "step"),
    [
        ("ms_deform_attn_module", "grad_value", 1e-6),
        ("atss_assigner", "gt_inds", 1),
        ("max_iou_assigner", "gt_inds", 1),
        ("roi_extractor", "output_first4", 1e-3),
        ("delta_coder", "decoded", 1.0),
    ],
)
def test_a_wrong_number_is_noticed(unit, key, step):
    index = 1  # for max_iou_assigner, the element that differs by design
    entry = copy.deepcopy(load_units()[unit][index])
    entry[key].view(-1)[0] += step
    (failure,) = failures(check_units({unit: [entry]}))
    assert f"{unit}[0].{key}" in failure


def test_an_entry_that_nothing_compares_is_noticed():
    entry = {**load_units()["inverse_sigmoid"], "eps_1e_2": 0.0}
    assert ["eps_1e_2" in each for each in failures(check_units({"inverse_sigmoid": entry}))] == [
        True
    ]
    assert failures(check_units({"new_unit": {"x": 0.0}}))
