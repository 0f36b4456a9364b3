"""Spelling and names, as Detectron2 and torchvision have them."""

import ast
import re

from tests.paths import ROOT

BRITISH = re.compile(
    r"cent(re|ring)|colour|grey|behaviour|neighbour|honour|favour|labell|learnt|artefact|licence|"
    r"aria-labeledby|"  # an attribute of HTML that is spelled so everywhere
    r"(analy|normali|generali|initiali|optimi|summari|maximi|minimi|visuali|recogni|customi|vectori|"
    r"randomi|regulari|parametri|seriali|synchroni|quanti|categori|equali|organi)s(e|ed|es|ing|er|"
    r"ers|ation)(?![a-z])",
    re.IGNORECASE,
)
# Nouns, and the attribute as it should be.
RIGHT = re.compile(r"analyses|aria-labelledby", re.IGNORECASE)
# What knows the old names.
OLD = {
    "co_detr/moved.py",
    "tests/checkpoint/test_old_names.py",
    "tests/engine/test_moved.py",
    "tests/quickstart/test_plots.py",
    "tests/test_names.py",
}
FOLDERS = ("benchmarks", "co_detr", "configs", "docs", "scripts", "tests", "tools")
KINDS = {".py", ".md", ".html", ".css", ".js", ".yaml", ".sh", ".h", ".cpp", ".cu", ".toml"}


def sources(*kinds: str) -> dict[str, str]:
    """Text of the repository's files by their paths, without data."""
    paths = [*ROOT.glob("*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    names = {path.relative_to(ROOT).as_posix(): path for path in paths if path.suffix in kinds}
    return {
        name: path.read_text(encoding="utf-8")
        for name, path in names.items()
        if name not in OLD and not name.startswith("tests/data/")
    }


def test_spelling_is_american() -> None:
    wrong = [
        f"{name}, line {number}: {found[0]}"
        for name, text in sources(*KINDS).items()
        for number, line in enumerate([name, *text.splitlines()])
        if (found := BRITISH.search(RIGHT.sub("", line)))
    ]
    assert not wrong


def test_loop_variables_say_what_they_are() -> None:
    wrong = [
        f"{name}: for each in {ast.unparse(node.iter)}"
        for name, text in sources(".py").items()
        if "each" in text
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.For | ast.comprehension)
        and any(isinstance(part, ast.Name) and part.id == "each" for part in ast.walk(node.target))
    ]
    assert not wrong
