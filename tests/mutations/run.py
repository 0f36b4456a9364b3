"""Applies the mutations one by one in a copy of the repository: do the tests notice them?

    python -m tests.mutations.run                       all lists
    python -m tests.mutations.run --only NAME [NAME ...] --jobs 2 --json result.json

The tests are first run unmutated and have to pass. A mutation is *caught* when a test fails or runs
into the time limit, and *survives* when all pass; anything else (it does not compile, its text is
no longer there, nothing but set-up failed) is an *error* of the list.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import pkgutil
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tests import mutations
from tests.mutations import Mutation

ROOT = Path(__file__).resolve().parents[2]
NOT_COPIED = (
    ".git",
    ".venv",
    "build",
    "output",
    "datasets",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
)


@dataclass(frozen=True)
class Outcome:
    """``status``: caught, survived or error; ``detail``: the test that failed, or why none did."""

    status: str
    detail: str
    seconds: float


@dataclass(frozen=True)
class TestRun:
    """What pytest reported: numbers of tests, and the first that failed, with its message."""

    __test__ = False  # no test of pytest's

    passed: int = 0
    failures: int = 0
    errors: int = 0
    first: str = ""
    timed_out: bool = False
    output: str = ""


def all_mutations() -> list[Mutation]:
    """Of all modules of this package, in the order of their names."""
    found = []
    for module in pkgutil.iter_modules(mutations.__path__):
        if module.name != "run" and not module.name.startswith("test_"):
            found += importlib.import_module(f"tests.mutations.{module.name}").MUTATIONS
    return found


def copy_tree(root: Path, folder: Path) -> Path:
    """The repository as it is, compiled extension included; data beside it stays beside it."""
    copy = folder / root.name
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns(*NOT_COPIED), symlinks=True)
    if (root.parent / "shared").exists():
        (folder / "shared").symlink_to(root.parent / "shared")
    return copy


def run_limited(command: Sequence[str], folder: Path, limit: float) -> tuple[int | None, str]:
    """Exit status, None when it took too long, and output. Children end with the command."""
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        # A change within the same second and of the same size would not be seen otherwise.
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return status, output.read()


def run_tests(tree: Path, tests: Sequence[str], limit: float) -> TestRun:
    """Runs pytest until the first failure."""
    report = tree.parent / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-x", f"--junitxml={report}", *tests]
    status, output = run_limited(command, tree, limit)
    if status is None:
        return TestRun(timed_out=True, output=output)
    if not report.exists():
        return TestRun(output=output)
    suite = ElementTree.parse(report).getroot().find("testsuite")
    failures, errors, skipped, total = (
        int(suite.get(key)) for key in ("failures", "errors", "skipped", "tests")
    )
    first = ""
    for case in suite.iter("testcase"):
        problem = case.find("failure") if case.find("failure") is not None else case.find("error")
        if problem is not None:
            lines = (problem.get("message") or "").splitlines()
            first = f"{case.get('name')}: {lines[0] if lines else ''}"
            break
    passed = total - failures - errors - skipped
    return TestRun(passed, failures, errors, first, output=output)


@contextlib.contextmanager
def mutated(tree: Path, mutation: Mutation) -> Iterator[None]:
    """The file is changed inside; file and compiled extension are as before afterwards."""
    path = tree / mutation.file
    before = path.read_text()
    extensions = {path: path.read_bytes() for path in tree.glob("co_detr/*.so")}
    path.write_text(mutation.apply(before))
    try:
        yield
    finally:
        path.write_text(before)
        if mutation.rebuild:
            for extension, content in extensions.items():
                extension.write_bytes(content)


def rebuild(tree: Path, limit: float) -> str | None:
    """Builds the CPU kernels in place; None, or the end of the compiler's output."""
    for extension in tree.glob("co_detr/*.so"):
        extension.unlink()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    status, output = run_limited(["env", "CO_DETR_NO_CUDA=1", *command], tree, limit)
    return None if status == 0 else output[-300:]


def judge(tree: Path, mutation: Mutation, limit: float) -> Outcome:
    start = time.monotonic()

    def outcome(status: str, detail: str) -> Outcome:
        return Outcome(status, detail, round(time.monotonic() - start, 1))

    try:
        with mutated(tree, mutation):
            if mutation.rebuild:
                problem = rebuild(tree, limit)
                if problem is not None:
                    return outcome("error", f"does not build: {problem}")
            run = run_tests(tree, mutation.tests, limit)
    except (OSError, ValueError) as error:
        return outcome("error", str(error))
    if run.timed_out:
        return outcome("caught", f"no end after {limit:g} s")
    if run.failures:
        return outcome("caught", run.first)
    if run.errors or not run.passed:
        return outcome("error", run.first or run.output[-300:])
    return outcome("survived", f"{run.passed} tests passed")


def run_all(root: Path, chosen: Sequence[Mutation], jobs: int, limit: float) -> dict[str, Outcome]:
    """Outcomes by name.

    Raises:
        SystemExit: the unmutated tests fail, or none of them runs.
    """
    with tempfile.TemporaryDirectory(prefix="mutations-") as temporary:
        trees: queue.Queue[Path] = queue.Queue()
        for number in range(jobs):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            trees.put(copy_tree(root, folder))

        @contextlib.contextmanager
        def some_tree() -> Iterator[Path]:
            tree = trees.get()
            try:
                yield tree
            finally:
                trees.put(tree)

        def unmutated(tests: tuple[str, ...]) -> str | None:
            with some_tree() as tree:
                run = run_tests(tree, tests, limit)
            right = run.passed and not (run.failures or run.errors or run.timed_out)
            return None if right else f"pytest {' '.join(tests)}: {run.first or run.output[-1000:]}"

        def mutate(mutation: Mutation) -> Outcome:
            with some_tree() as tree:
                outcome = judge(tree, mutation, limit)
            print(f"{outcome.status:9}{mutation.name:44}{outcome.seconds:6.1f} s", flush=True)
            return outcome

        with ThreadPoolExecutor(jobs) as pool:
            groups = list(dict.fromkeys(mutation.tests for mutation in chosen))
            wrong = [text for text in pool.map(unmutated, groups) if text]
            if wrong:
                raise SystemExit("the unmutated code does not pass:\n" + "\n".join(wrong))
            outcomes = list(pool.map(mutate, chosen))
    return dict(zip((mutation.name for mutation in chosen), outcomes, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names, see --list")
    parser.add_argument("--list", action="store_true", help="print the mutations and end")
    parser.add_argument("--jobs", type=int, default=1, help="copies that are worked on at once")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one run of tests")
    parser.add_argument("--json", type=Path, help="where to write the outcomes")
    options = parser.parse_args(arguments)
    chosen = all_mutations()
    if options.only:
        unknown = set(options.only) - {mutation.name for mutation in chosen}
        if unknown:
            parser.error(f"no mutation is called {', '.join(sorted(unknown))}; see --list")
        chosen = [mutation for mutation in chosen if mutation.name in options.only]
    if options.list:
        for mutation in chosen:
            print(f"{mutation.name:44}{mutation.file}")
        return 0
    outcomes = run_all(ROOT, chosen, options.jobs, options.limit)
    print("\n| mutation | outcome | seconds | by |\n|---|---|---|---|")
    for name, outcome in outcomes.items():
        detail = " ".join(outcome.detail.split()).replace("|", "\\|")[:110]
        print(f"| {name} | {outcome.status} | {outcome.seconds} | {detail} |")
    if options.json:
        records = {name: dataclasses.asdict(outcome) for name, outcome in outcomes.items()}
        options.json.write_text(json.dumps(records, indent=2) + "\n")
    caught = sum(outcome.status == "caught" for outcome in outcomes.values())
    print(f"\n{caught} of {len(outcomes)} caught")
    return 0 if caught == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
