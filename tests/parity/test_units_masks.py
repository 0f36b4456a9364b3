"""Masks in the data against the reference's numbers, and the check against wrong numbers."""

import copy
import functools

import pytest

from tests.golden import SHIPPED
from tests.parity.oracle.check import check_units
from tests.parity.oracle.golden import load_golden
from tests.parity.oracle.report import Report
from tests.parity.oracle.tolerances import HIDDEN_OBJECTS

NAMES = ("bitmap_ops", "coco_rle", "copy_paste")


@functools.cache
def load_units() -> dict:
    """Not to be changed."""
    return load_golden(SHIPPED / "units_M_data.pt.xz")


def check(entries: dict) -> Report:
    report = Report()
    check_units(entries, report)
    return report


@pytest.mark.parametrize("name", NAMES)
def test_unit_agrees_with_the_reference(name):
    report = check({name: load_units()[name]})
    assert not [str(line) for line in report.failures]
    assert sum(line.status == "ok" for line in report.lines) > 5


def test_the_only_difference_is_an_object_of_which_nothing_is_left():
    assert {
        (line.name, line.difference) for line in check(load_units()).lines if line.difference
    } == {
        (f"copy_paste.runs.hand_made_all.{key}", HIDDEN_OBJECTS)
        for key in ("boxes", "labels", "masks_rle", "mask_areas")
    }
    areas = load_units()["copy_paste"]["runs"]["hand_made_all"]["mask_areas"]
    assert areas.count(0) == 1


def _stays(units):
    # One object more than the reference keeps, by its limit of pixels.
    units["copy_paste"]["mask_occluded_thr"] = 299


def _moves(units):
    units["copy_paste"]["bbox_occluded_thr"] = 9


def _area(units):
    units["coco_rle"]["objects"][2]["area"] += 1


def _pixel(units):
    units["bitmap_ops"]["resize_37x61"][3, 20, 56] ^= 1


def _order(units):
    run = units["copy_paste"]["runs"]["random"][0]
    run["labels"] = run["labels"].flip(0)


def _color(units):
    units["copy_paste"]["runs"]["all_objects"]["img"][50, 60, 1] ^= 1


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (_stays, {"runs.hand_made_all.boxes"}),
        (_moves, {"runs.hand_made_all.boxes"}),
        (_area, {"objects[2].area"}),
        (_pixel, {"resize_37x61"}),
        (_order, {"runs.random[0].labels"}),
        (_color, {"runs.all_objects.img"}),
    ],
)
def test_a_wrong_number_is_noticed(change, names):
    units = copy.deepcopy(load_units())
    change(units)
    found = {line.name.partition(".")[2] for line in check(units).failures}
    assert names <= found
