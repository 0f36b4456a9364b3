"""Files that hosts of code and containers read: workflow, forms of issues, Dockerfile."""

import re
from pathlib import Path

import yaml

from tests.paths import ROOT

SETUP = (ROOT / "setup.py").read_text()
GUIDE = (ROOT / "docs" / "get_started.md").read_text()
FORMS = ROOT / ".github" / "ISSUE_TEMPLATE"


def read_yaml(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_workflow_tests_every_python_of_the_package() -> None:
    workflow = read_yaml(ROOT / ".github" / "workflows" / "test.yml")
    job = workflow["jobs"]["test"]
    versions = job["strategy"]["matrix"]["python"]
    (least,) = re.findall(r'python_requires=">=(3\.\d+)"', SETUP)
    first, last = re.search(r"one wheel serves Python (3\.\d+) to (3\.\d+)", GUIDE).groups()
    assert versions[0] == least == first and versions[-1] == last
    minors = [int(version.removeprefix("3.")) for version in versions]
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert job["steps"][-1]["run"] == ".ci/run" and (ROOT / ".ci" / "run").is_file()
    assert read_yaml(ROOT / ".github" / "workflows" / "test.yml")[True]["push"]  # YAML: on is true


def test_forms_of_issues() -> None:
    assert read_yaml(FORMS / "config.yml")["blank_issues_enabled"] is True
    for name in ("bug_report.yml", "feature_request.yml"):
        form = read_yaml(FORMS / name)
        assert form["name"] and form["description"]
        ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
        assert len(ids) == len(set(ids)) >= 2
        for part in form["body"]:
            assert part["type"] in ("markdown", "textarea", "checkboxes", "input", "dropdown")
            assert part["attributes"].get("value" if part["type"] == "markdown" else "label")
    (info,) = [
        part for part in read_yaml(FORMS / "bug_report.yml")["body"] if part.get("id") == "info"
    ]
    assert "`co-detr info`" in info["attributes"]["label"] and info["validations"]["required"]


def stages(text: str) -> list[list[tuple[str, str]]]:
    """Instructions and their arguments, by stage; the first is what stands before FROM."""
    lines = "".join(line for line in text.splitlines(True) if not line.startswith("#"))
    found: list[list[tuple[str, str]]] = [[]]
    for line in re.sub(r"\\\n *", " ", lines).splitlines():
        if line:
            word, _, rest = line.partition(" ")
            if word == "FROM":
                found.append([])
            found[-1].append((word, rest))
    return found


DOCKERFILE = stages((ROOT / "Dockerfile").read_text())


def values(stage: list[tuple[str, str]], word: str) -> list[str]:
    return [rest for name, rest in stage if name == word]


def test_the_image_copies_what_is_there_and_what_the_package_needs() -> None:
    _, build, _ = DOCKERFILE
    let_through = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in let_through
    copied = [word for rest in values(build, "COPY") for word in rest.split()[:-1]]
    for pattern in copied:
        assert list(ROOT.glob(pattern)), pattern
        assert f"!{pattern}" in let_through
    included = re.findall(r"[\w*.-]+\.txt", (ROOT / "MANIFEST.in").read_text())
    assert {*included, "setup.py", "pyproject.toml", "configs", "co_detr"} <= set(copied)


def test_the_image_is_built_as_the_page_says() -> None:
    arguments, build, final = DOCKERFILE
    made, installed = values(build, "RUN"), values(final, "RUN")
    for command in (
        'pip install build "setuptools<81" wheel ninja',
        "python -m build --no-isolation",
    ):
        assert command in made and command in GUIDE
    assert any("co-detr install-detectron2" in line for line in installed)
    assert "co-detr install-detectron2" in GUIDE
    (extras,) = re.findall(r"\.whl\)\[(.*?)\]", " ".join(installed))
    assert all(f'"{extra}"' in SETUP for extra in extras.split(","))
    # The second stage has no compiler, and nothing but images of public names is fetched by it.
    assert not any(
        word in line for line in installed for word in ("apt-get", "gcc", "g++", "ninja")
    )
    assert "://" not in (ROOT / "Dockerfile").read_text()
    names = {line.partition("=")[0] for line in values(arguments, "ARG")}
    assert [values(stage, "FROM")[0].split()[0] for stage in (build, final)] == [
        f"${{{name}}}" for name in sorted(names)
    ]
    for switch in ("FORCE_CUDA", "TORCH_CUDA_ARCH_LIST"):
        assert switch in SETUP and any(line.startswith(switch) for line in values(build, "ARG"))


def test_the_image_runs_as_an_ordinary_user() -> None:
    final = DOCKERFILE[-1]
    words = [word for word, _ in final]
    (user,) = values(final, "USER")
    assert user != "root" and f"useradd --create-home {user}" in " ".join(values(final, "RUN"))
    assert words.index("USER") > max(i for i, word in enumerate(words) if word == "RUN")
    assert values(final, "ENTRYPOINT") == ['["co-detr"]']
    assert '"console_scripts": ["co-detr = ' in SETUP
