"""Who may import whom, as the source says it: nothing is imported here."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from tests.conftest import TOOLS as MARKED

ROOT = Path(__file__).resolve().parents[1]
TOOLS = "co_detr.tools"
# The lower packages of the core, with those that they may import; see docs/design.md.
BELOW = {"layers": (), "modeling": ("layers",), "data": ()}
# Files of the package, and of its core, around which the tools stand. A new one stands for
# something new: what is read together stands together.
MOST_FILES = 142
MOST_CORE_FILES = 86


def modules(folder: str) -> dict[str, Path]:
    """All Python files of a folder by the dotted names of their modules."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


PACKAGE = modules("co_detr")
CORE = {name: path for name, path in PACKAGE.items() if not is_in(name, TOOLS)}
TESTS = modules("tests")


def nodes(path: Path, at_import: bool = False) -> Iterator[ast.AST]:
    """The nodes of a file; with `at_import`, those that run when it is imported."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        yield node
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)


def imports(path: Path, at_import: bool = False) -> Iterator[tuple[str, str]]:
    """Modules and names that a file imports; the name of a whole module is empty."""
    for node in nodes(path, at_import):
        if isinstance(node, ast.ImportFrom):
            above = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def needed(name: str, path: Path) -> set[str]:
    """Modules of the package that run before this one, with the packages that they are in."""
    found = set()
    for module, member in imports(path, at_import=True):
        whole = f"{module}.{member}"
        target = whole if whole in PACKAGE else module
        while target in PACKAGE:
            # A package is begun, but need not be complete, when one of its modules runs.
            if target == module or target == whole or not is_in(name, target):
                found.add(target)
            target = target.rpartition(".")[0]
    return found - {name, "co_detr"}


def test_the_core_does_not_know_the_tools() -> None:
    lazy = {
        ("co_detr", "co_detr.tools.export.predictor", "ExportedPredictor"),
        ("co_detr", "co_detr.tools.predict.predictor", "Predictor"),
    }
    wrong = [
        (name, module, member)
        for name, path in CORE.items()
        for module, member in imports(path)
        if is_in(module, TOOLS) or is_in(f"{module}.{member}", TOOLS)
    ]
    assert set(wrong) == lazy


def test_the_lower_packages_import_no_others() -> None:
    packages = [path.parent.name for path in (ROOT / "co_detr").glob("*/__init__.py")]
    wrong = [
        f"{name} imports {module}.{member}"
        for package, below in BELOW.items()
        for name, path in CORE.items()
        if is_in(name, f"co_detr.{package}")
        for module, member in imports(path)
        for other in packages
        if other not in (package, *below)
        and (is_in(module, f"co_detr.{other}") or is_in(f"{module}.{member}", f"co_detr.{other}"))
    ]
    assert not wrong


def test_what_is_marked_as_tools_exists() -> None:
    assert all((ROOT / "tests" / name).exists() for name in MARKED)


def test_no_module_needs_itself() -> None:
    graph = {name: needed(name, path) for name, path in PACKAGE.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"modules import each other: {' <- '.join(error.args[1])}") from None


def test_tests_share_public_names_only() -> None:
    own = {*TESTS, *(name.rpartition(".")[2] for name in TESTS)}
    wrong = [
        f"{path.relative_to(ROOT)} imports {member} from {module}"
        for path in TESTS.values()
        for module, member in imports(path)
        if module in own and member.startswith("_")
    ]
    assert not wrong


def test_tests_are_one_package() -> None:
    bare = {name.rpartition(".")[2] for name in TESTS} - {"tests"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {module} without tests."
        for path in TESTS.values()
        for module, _ in imports(path)
        if module in bare
    ]
    assert not wrong


def test_nothing_changes_the_path_of_python() -> None:
    """Programs that need this checkout are modules: ``python -m benchmarks.train_step``."""
    wrong = [
        str(path.relative_to(ROOT))
        for folder in ("benchmarks", "co_detr", "scripts", "tests", "tools")
        for path in modules(folder).values()
        if any(changes_path(node) for node in nodes(path))
    ]
    # Started by their paths, from anywhere, and made of this checkout's tests.
    assert wrong == ["tools/check_parity.py", "tools/make_compact_goldens.py"]


def changes_path(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).startswith("sys.path.")


def test_number_of_files() -> None:
    assert len(PACKAGE) <= MOST_FILES
    assert len(CORE) <= MOST_CORE_FILES
