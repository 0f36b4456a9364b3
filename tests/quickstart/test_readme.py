"""What the README and the pages of docs/ tell people to type or to open must exist."""

import re
import shlex
from pathlib import Path

import pytest

from co_detr.model_zoo import ZOO

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
GUIDE = [README, *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [
    *GUIDE,
    *sorted({*ROOT.glob("*.md")} - {README}),
    *sorted((ROOT / "benchmarks").glob("*.md")),
    ROOT / "tests" / "data" / "README.md",
]
FENCED = re.compile(r"```.*?```", re.DOTALL)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def shell_commands(page: Path) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = (shlex.split(line, comments=True) for line in lines)
    return [words for words in commands if words]


def commands_with(program: str, page: Path) -> list[list[str]]:
    return [words for words in shell_commands(page) if program in words]


def test_readme_is_short_and_begins_with_what_matters() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 200
    assert any("**Nothing here has run on a GPU yet.**" in line for line in lines[:15])
    commands = [" ".join(words) for words in shell_commands(README)]
    needed = [
        "make quickstart",
        "make setup && source .venv/bin/activate",
        "make test",
        "make lint",
    ]
    assert not {*needed} - {*commands}
    assert len(commands_with("train_net.py", README)) >= 2
    assert len(commands_with("predict.py", README)) >= 3


def test_design_is_short() -> None:
    assert len((ROOT / "docs" / "design.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_mentioned_files_exist(page: Path) -> None:
    text = page.read_text()
    folders = "benchmarks|co_detr|configs|docs|scripts|tests|tools"
    mentioned = set(re.findall(rf"(?<![\w./-])(?:{folders})/[\w./*-]*[\w*]", text))
    mentioned |= {
        f"configs/baselines/{name}" for name in re.findall(r"`baselines/(\w+\.py)`", text)
    }
    assert [name for name in sorted(mentioned) if not [*ROOT.glob(name)]] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_mentioned_modules_exist(page: Path) -> None:
    """Dotted names of the package: the module, or its folder, has to be there."""
    missing = []
    for name in set(re.findall(r"\bco_detr(?!\.(?:json|py)\b)(?:\.\w+)+", page.read_text())):
        parts = name.split(".")
        source = ROOT / parts[0]
        while len(parts) > 1 and (source / parts[1]).is_dir():
            source = source / parts.pop(1)
        if len(parts) > 1 and (source / f"{parts[1]}.py").exists():
            source = source / f"{parts.pop(1)}.py"
        else:
            source = source / "__init__.py"
        if len(parts) > 1 and not re.search(rf"\b{parts[1]}\b", source.read_text()):
            missing.append(name)
    assert not missing


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    found: set[str] = set()
    for title in re.findall(r"^#+ +(.+)$", FENCED.sub("", page.read_text()), flags=re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        anchor = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        number = 1
        while (unique := anchor if number == 1 else f"{anchor}-{number - 1}") in found:
            number += 1
        found.add(unique)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", FENCED.sub("", page.read_text()))
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            dead.append(target)
    assert not dead


def test_every_page_is_in_the_list_of_pages() -> None:
    listed = (ROOT / "docs" / "README.md").read_text()
    assert [page.name for page in GUIDE[1:] if f"]({page.name})" not in listed] == ["README.md"]


def test_models_of_the_readme_are_those_of_the_zoo() -> None:
    row = re.compile(r"^\| `(\w+)` \| (.+?) \| (\w+) \| (\S*) \|$", re.MULTILINE)
    rows = row.findall(README.read_text())
    assert len(rows) >= 10
    for name, summary, dataset, ap in rows:
        entry = ZOO[name]
        assert (entry.summary, entry.dataset, f"{entry.ap:.1f}") == (summary, dataset, ap)
