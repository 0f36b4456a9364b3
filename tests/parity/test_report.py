"""The tools of the fidelity check: comparisons, book-keeping, exit status."""

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.golden import load_units
from tests.parity.oracle.golden import flatten, load_golden, save_golden
from tests.parity.oracle.head_checks import RPNAssignment, reference_rule, rpn_matcher
from tests.parity.oracle.report import Report, deviation, equality, format_summary, match_rows
from tests.parity.oracle.tolerances import RPN_PADDING
from tests.parity.oracle.training import RecordedPermutations

NAN, INF = float("nan"), float("inf")
TOOL = Path(__file__).parents[2] / "tools" / "check_parity.py"


def run_tool(*arguments: str) -> int:
    spec = importlib.util.spec_from_file_location("check_parity", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(arguments)


@pytest.mark.parametrize(
    ("expected", "actual", "ok"),
    [
        ([1.0, 2.0], [1.0, 2.05], True),
        ([1.0, 2.0], [1.0, 2.2], False),
        ([1.0, INF], [1.0, INF], True),
        ([1.0, INF], [1.0, -INF], False),
        ([1.0, 2.0], [1.0, NAN], False),
        ([1.0, NAN], [1.0, NAN], False),
        ([1.0], [1.0, 1.0], False),
        ([], [], True),
    ],
)
def test_deviation(expected, actual, ok):
    assert deviation(torch.tensor(expected), torch.tensor(actual), atol=0.1).ok == ok


def test_deviation_by_column_and_in_places():
    expected, actual = torch.zeros(2, 2), torch.tensor([[0.5, 0.0], [0.0, 0.05]])
    assert deviation(expected, actual, atol=(0.6, 0.1)).ok
    assert not deviation(expected, actual, atol=(0.1, 0.6)).ok
    assert deviation(expected, actual, where=torch.tensor([[False, True], [True, False]])).ok


def test_equality():
    assert equality(torch.tensor([1, 2]), torch.tensor([1, 2])).ok
    assert not equality(torch.tensor([1, 2]), torch.tensor([1, 3])).ok
    assert not equality(torch.tensor([1, 2]), None).ok
    assert not equality(None, torch.tensor([1, 2])).ok
    assert not equality([1, 2], [2, 1]).ok


def test_rows_are_matched_one_to_one():
    expected = torch.tensor([[0.0], [0.0], [5.0]])
    assert match_rows(expected, expected[[2, 0, 1]], 0.1).tolist() == [1, 2, 0]
    doubled = torch.tensor([[0.0], [5.0], [5.0]])
    order = match_rows(expected, doubled, 0.1)
    assert sorted(order.tolist()) == [0, 1, 2]
    assert not deviation(expected, doubled[order], 0.1).ok


def test_every_entry_has_one_line_with_its_worst_finding():
    report = Report(flatten({"a": torch.zeros(2), "b": [torch.ones(1), torch.ones(1)], "c": 1}))
    report.given("a", "fed")
    report.close("a", torch.full((2,), 0.05), atol=0.1)
    report.close("b", [torch.ones(1), torch.ones(1)], note="first")
    report.close("b", [torch.ones(1), torch.zeros(1)], note="second")
    report.finish()
    lines = {line.name: line for line in report.lines}
    assert {name: line.status for name, line in lines.items()} == {
        "a": "ok",
        "b[0]": "ok",
        "b[1]": "FAIL",
        "c": "FAIL",
    }
    assert lines["a"].ratio == pytest.approx(0.5)
    assert lines["b[0]"].note == "first; second"
    assert lines["c"].note == "not compared"


def test_missing_entries_are_failures_unless_declared():
    report = Report(flatten({"a": [torch.zeros(1)]}), dropped=("b",))
    report.close("a", [torch.zeros(1), torch.zeros(1)])
    report.close("b.c", torch.zeros(1))
    report.exact("bb", 1)
    assert [line.name for line in report.failures] == ["a[1]", "bb"]


def test_a_difference_by_design_has_to_explain():
    report = Report({"a": 0, "b": 0})
    report.known("a", RPN_PADDING, holds=True)
    report.known("b", RPN_PADDING, holds=False)
    assert [line.status for line in report.lines] == ["known", "FAIL"]


def test_what_breaks_a_part_is_a_failure():
    report = Report({"a": 0})
    with report.part("first"):
        raise KeyError("lost")
    report.finish()
    assert [line.name for line in report.failures] == ["<check of first>", "a"]
    assert "test_report.py" in report.failures[0].note and "lost" in report.failures[0].note


def test_the_summary_names_each_difference_once_with_counts():
    report = Report({"a": 0, "b": 0, "c": 0})
    report.known("a", RPN_PADDING, holds=True)
    report.given("b", "fed", RPN_PADDING)
    report.exact("c", 1)
    summary = format_summary({"case_X.pt": report})
    assert "rpn-padding: 1 entries differ, 1 were bridged" in summary
    assert summary.count("rpn-padding") == 1
    assert summary.splitlines()[1].split()[:6] == ["case_X.pt", "3", "0", "1", "1", "1"]


def test_low_quality_matches_explain_nothing_else():
    overlaps = torch.tensor([[0.8, 0.1, 0.75, 0.0], [0.0, 0.4, 0.2, 0.1]])
    seen = torch.ones(4, dtype=torch.bool)
    reference = reference_rule(overlaps)
    assert reference.tolist() == [1, 2, 1, 0]
    for anchor, wrong in ((0, 2), (2, 0), (3, -1)):
        other = reference.clone()
        other[anchor] = wrong
        found = RPNAssignment.compare(rpn_matcher(True), overlaps, other, seen)
        assert found.differing == 1 and not found.explained


def test_recorded_draws_must_be_of_as_many_things():
    draws = RecordedPermutations([torch.arange(4), torch.arange(3), torch.arange(2)])
    assert len(draws.draw(4)) == 4 and draws.num_shorter == 0
    assert len(draws.draw(5, lacks=frozenset({2}))) == 3 and draws.num_shorter == 1
    with pytest.raises(RuntimeError, match="of 3, the reference of 2"):
        draws.draw(3)
    with pytest.raises(RuntimeError, match="not recorded"):
        draws.draw(3)


def test_golden_files_may_be_compressed(tmp_path):
    content = {"x": torch.arange(3), "y": [1, None, "z"]}
    for name in ("a.pt", "a.pt.xz"):
        save_golden(content, tmp_path / name)
        assert str(load_golden(tmp_path / name)) == str(content)


def test_exit_status(tmp_path, capsys):
    assert run_tool(str(tmp_path / "nowhere")) == 2
    assert "case_*.pt" in capsys.readouterr().err
    unit = dict(load_units()["inverse_sigmoid"])
    torch.save({"inverse_sigmoid": unit, "qfl": load_units()["qfl"]}, tmp_path / "units.pt")
    assert run_tool(str(tmp_path)) == 0
    output = capsys.readouterr().out
    assert "inverse_sigmoid.eps_1e_5" in output and output.endswith("PASS\n")

    unit["eps_1e_5"] = unit["eps_1e_5"] + 1e-3
    torch.save({"inverse_sigmoid": unit}, tmp_path / "units.pt")
    assert run_tool(str(tmp_path), "--failures-only") == 1
    output = capsys.readouterr().out
    assert "inverse_sigmoid.eps_1e_5" in output and "inverse_sigmoid.eps_1e_3" not in output

    (tmp_path / "units.pt").write_bytes(b"broken")
    assert run_tool(str(tmp_path)) == 1
    assert "<check of units.pt>" in capsys.readouterr().out
