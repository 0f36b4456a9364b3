"""Parts of the mask head against the reference's numbers, and the check against wrong numbers."""

import copy
import functools

import pytest

from tests.golden import SHIPPED
from tests.parity.oracle.check import check_units
from tests.parity.oracle.golden import load_golden
from tests.parity.oracle.report import Report
from tests.parity.oracle.units_mask_head import CHECKS


@functools.cache
def load_units() -> dict:
    """Not to be changed."""
    return load_golden(SHIPPED / "units_M_head.pt.xz")


def check(entries: dict) -> Report:
    report = Report()
    check_units(entries, report)
    return report


def test_every_unit_agrees_with_the_reference():
    report = check(load_units())
    assert not [str(line) for line in report.failures]
    compared = {line.name.partition(".")[0] for line in report.lines if line.status == "ok"}
    assert compared == set(load_units()) == set(CHECKS)
    assert sum(line.status == "ok" for line in report.lines) > 150
    assert not any(line.difference for line in report.lines)


@pytest.mark.parametrize(
    ("unit", "key", "step"),
    [
        ("multi_branch_fusion_avg", "output", 1e-2),
        ("boundary", "by_width.2", 1),
        ("mask_targets", "targets_28", 1),
        ("mask_iou", "targets", 1e-3),
        ("test_refine", "refined.112", 1e-2),
        ("paste", "masks", 1),
        ("mask_roi_align", "levels", 1),
        ("refine_mask_head", "grads.stages.0.fuse_conv.0.bias", 1e-1),
    ],
)
def test_a_wrong_number_is_noticed(unit, key, step):
    units = copy.deepcopy(load_units())
    entry, *path = units[unit], *key.split(".", 1)
    if path[0] in entry and len(path) == 2:
        entry, path = entry[path[0]], path[1:]
    entry[path[0]].view(-1)[-1] += step
    assert [line.name for line in check(units).failures] == [f"{unit}.{key}"]
