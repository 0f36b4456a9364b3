"""The lists of mutations fit the code, and the program that applies them tells outcomes apart."""

import time
from pathlib import Path

import pytest

from tests.mutations import Mutation, run

ROOT = Path(__file__).parents[2]
MUTATIONS = run.all_mutations()


def test_names_are_unique():
    names = [mutation.name for mutation in MUTATIONS]
    assert len(names) == len(set(names)) > 0


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation_fits_the_code(mutation):
    text = (ROOT / mutation.file).read_text()
    assert mutation.apply(text) != text
    for argument in mutation.tests:
        path = argument.split("::")[0]
        assert not path.startswith("tests") or (ROOT / path).exists(), argument


@pytest.fixture
def tree(tmp_path) -> Path:
    root = tmp_path / "project"
    (root / "tests").mkdir(parents=True)
    (root / "code.py").write_text("def double(x):\n    return 2 * x\n\n\nLIMIT = 7\n")
    (root / "tests" / "test_code.py").write_text(
        "import pytest\nimport code_of_project as code\n\n\n"
        "@pytest.fixture\ndef limit():\n    return 10 // code.LIMIT\n\n\n"
        "def test_double():\n    assert code.double(3) == 6\n\n\n"
        "def test_limit(limit):\n    pass\n"
    )
    (root / "code.py").rename(root / "code_of_project.py")
    return root


def mutation(name: str, old: str, new: str, tests: str = "tests/test_code.py") -> Mutation:
    return Mutation(name, "code_of_project.py", old, new, (tests,))


def test_outcomes(tree):
    before = (tree / "code_of_project.py").read_text()
    outcomes = run.run_all(
        tree,
        [
            mutation("caught", "2 * x", "3 * x"),
            mutation("survived", "LIMIT = 7", "LIMIT = 8"),
            mutation("twice", "x", "y"),
            mutation("set-up fails", "LIMIT = 7", "LIMIT = 0"),
            mutation("no python", "def double(x):", "def double(x:"),
        ],
        jobs=1,
        limit=100,
    )
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "caught": "caught",
        "survived": "survived",
        "twice": "error",
        "set-up fails": "error",
        "no python": "error",
    }
    assert outcomes["caught"].detail.startswith("test_double: ")
    assert "occurs 2 times" in outcomes["twice"].detail
    assert (tree / "code_of_project.py").read_text() == before


@pytest.mark.parametrize("tests", ["tests/test_code.py::test_double", "tests/missing.py"])
def test_unmutated_code_has_to_pass(tree, tests):
    (tree / "code_of_project.py").write_text("def double(x):\n    return 5\n\n\nLIMIT = 7\n")
    with pytest.raises(SystemExit, match="the unmutated code does not pass"):
        run.run_all(tree, [mutation("any", "5", "6", tests)], jobs=1, limit=60)


def test_children_end_with_a_command_that_takes_too_long(tmp_path):
    command = ["sh", "-c", f"(sleep 2; touch {tmp_path}/late) & echo started; sleep 100"]
    assert run.run_limited(command, tmp_path, limit=0.5) == (None, "started\n")
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["--only", "no-such-mutation"])
    assert "no mutation is called no-such-mutation" in capsys.readouterr().err
