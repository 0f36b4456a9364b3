"""Every command line of the README and the pages would start: nothing is run, arguments are parsed.

Programs, subcommands and options have to exist; configs are read, and overrides have to name keys
of them. What no rule below knows fails.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import runpy
import shlex
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import co_detr.errors
from co_detr.command_line import COMMANDS
from co_detr.engine.config import load_config
from tests.paths import ROOT
from tests.quickstart.test_readme import PAGES, name_of

# What is only looked at as far as the shell understands it, and why.
ELSEWHERE = {
    "cd": "the shell's own",
    "source": "the shell's own",
    "cp": "copies what a build has made",
    "git": "needs the network, or a commit of the reader's",
    "python -m build": "comes from the network, by the line before",
}
# The pages speak of runs that they began; this is what the config.yaml of each was made of.
RUNS = {
    "output/mine/config.yaml": "configs/small/co_detr_small.py",
    "output/quickstart/config.yaml": "configs/quickstart.py",
}
# A grid that a command of the same block writes.
WRITTEN_GRIDS = {"my/folds/grid.yaml"}
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """The lines between ```bash and ```."""

    page: Path
    text: str

    @property
    def is_script(self) -> bool:
        return self.text.startswith("#!")

    def commands(self) -> Iterator[list[str]]:
        """The simple commands, as words, with variables of the block itself filled in."""
        variables: dict[str, str] = {}
        for line in re.sub(r"\\\n *", " ", self.text).splitlines():
            if self.is_script:  # of a shell script, only what it starts
                line = "".join(re.findall(r"\b(?:python|torchrun|co-detr) .*", line))
            words = list(split(string.Template(line).safe_substitute(variables)))
            for command in separated(words):
                if len(command) == 1 and (named := re.fullmatch(r"(\w+)=(.*)", command[0])):
                    variables[named[1]] = named[2]
                else:
                    yield command


def split(line: str) -> Iterator[str]:
    """The words of a line of shell, without comments and without an ellipsis at the end."""
    words = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    words.whitespace_split = True
    return (word for word in words if word != "...")


def separated(words: list[str]) -> Iterator[list[str]]:
    command: list[str] = []
    for word in [*words, ";"]:
        if set(word) <= set("&|;"):
            if command:
                yield command
            command = []
        else:
            command.append(word)


BLOCKS = [
    Block(page, text)
    for page in PAGES
    for text in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
]
LINES = {shlex.join(command): command for block in BLOCKS for command in block.commands()}


class Parsed(BaseException):
    """Ends a program when it has parsed its arguments."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options = options


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., argparse.Namespace]:
    """`parsed(start, argv)`: what the program that `start` starts makes of its arguments."""

    def ending(parse: Callable) -> Callable:
        def parse_and_end(*arguments: object) -> None:
            raise Parsed(parse(*arguments))

        return parse_and_end

    def options_of(start: Callable[[], object], argv: list[str]) -> argparse.Namespace:
        with monkeypatch.context() as patch, pytest.raises(Parsed) as ended:
            patch.setattr(sys, "argv", argv)
            patch.setattr(sys, "path", [*sys.path])
            for name in ("parse_args", "parse_intermixed_args"):
                parse = getattr(argparse.ArgumentParser, name)
                patch.setattr(argparse.ArgumentParser, name, ending(parse))
            start()
        return ended.value.options

    return options_of


@pytest.fixture
def check(parsed, monkeypatch, tmp_path) -> Callable[[list[str]], None]:
    """`check(words)` fails unless the command would start."""
    monkeypatch.chdir(ROOT)

    def any_command(words: list[str]) -> None:
        while re.match(r"[A-Z_]+=", words[0]):  # variables of the environment
            words = words[1:]
        program, *arguments = words
        program = program.removeprefix(".venv/bin/")
        if program in ELSEWHERE:
            return
        if program == "python":
            python(arguments)
        elif program == "torchrun":
            options = get_args_parser().parse_args(arguments)
            python([options.training_script, *options.training_script_args])
        elif program == "co-detr":
            subcommand(*arguments)
        elif program == "make":
            make(*arguments)
        elif program == "pip":
            pip(*arguments)
        elif program == "bash":
            script(*arguments)
        elif program == "docker":
            docker(*arguments)
        elif (ROOT / program).is_file():
            assert not arguments, f"no rule says what arguments {program} takes"
        else:
            pytest.fail(f"no rule for the program {program}")

    def python(arguments: list[str]) -> None:
        if arguments[0] == "-m":
            module, *rest = arguments[1:]
            if f"python -m {module}" in ELSEWHERE:
                return
            if module == "pytest":
                return run_of_tests(rest)
            argv = [module, *rest]
            found = parsed(lambda: runpy.run_module(module, run_name="__main__"), argv)
        else:
            source = (ROOT / arguments[0]).read_text(encoding="utf-8")
            if named := re.search(r'\bstart\("([\w-]+)"', source):
                return subcommand(named[1], *arguments[1:])
            found = parsed(lambda: runpy.run_path(arguments[0], run_name="__main__"), arguments)
        read_config(found)

    def subcommand(name: str, *arguments: str) -> None:
        command = COMMANDS[name]
        module = importlib.import_module(command.module)
        options = module.parse_arguments([*command.first, *arguments])
        if name != "ablate":
            read_config(options)
        elif options.grid not in WRITTEN_GRIDS:
            options.list, options.output_dir = True, tmp_path / "none"
            module.run(options)  # reads the configs of all variants, and lists what it would run

    def docker(action: str, *arguments: str) -> None:
        parser = argparse.ArgumentParser()
        if action == "build":
            parser.add_argument("-t")
            parser.add_argument("--build-arg", action="append", default=[])
            parser.add_argument("context", choices=["."])
            given = {text.partition("=")[0] for text in parser.parse_args(arguments).build_arg}
            declared = re.findall(r"^ARG (\w+)=", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
            assert given <= set(declared)
            return
        assert action == "run"
        parser.add_argument("--rm", action="store_true")
        for option in ("--gpus", "--shm-size", "--user", "-v", "-p"):
            parser.add_argument(option)
        parser.add_argument("image", choices=["co-detr", "co-detr:cuda"])
        parser.add_argument("command", nargs=argparse.REMAINDER)  # of the entry point
        subcommand(*parser.parse_args(arguments).command)

    return any_command


def read_config(options: argparse.Namespace) -> None:
    """Reads the config that is named, if one is, with the overrides that are given."""
    path = getattr(options, "config_file", None)
    if path is not None:
        overrides = [*getattr(options, "opts", ()), *getattr(options, "set", ())]
        load_config(RUNS.get(path, path), overrides)


def run_of_tests(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-q", action="store_true")
    parser.add_argument("-m", default="")
    parser.add_argument("paths", nargs="*")
    options = parser.parse_args(arguments)
    assert all((ROOT / path).exists() for path in options.paths)
    markers = set(re.findall(r"\w+", options.m)) - {"and", "or", "not"}
    declared = re.findall(r'^    "(\w+)[(:]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert markers <= set(declared)


def make(target: str, *variables: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    for variable in variables:
        name, _, value = variable.partition("=")
        assert re.search(rf"^{name} \?=", makefile, re.MULTILINE)
        if name == "OPTS":
            load_config("configs/quickstart.py", shlex.split(value))


def pip(action: str, *arguments: str) -> None:
    assert action in ("install", "uninstall")
    setup = (ROOT / "setup.py").read_text()
    for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if option == "-r":
            assert (ROOT / value).is_file()
        if ours := re.match(r"co_detr-([\d.]+)-.*\.whl(?:\[(.+)\])?$", option):
            assert ours[1] == co_detr.__version__
            assert all(f'"{extra}"' in setup for extra in re.findall(r"\w+", ours[2] or ""))


def script(path: str, *arguments: str) -> None:
    """Shell scripts explain their arguments at their top."""
    source = (ROOT / path).read_text()
    options = [argument for argument in arguments if argument.startswith("-")]
    assert all(re.search(rf"^# .*{option}\b", source, re.MULTILINE) for option in options)


def test_all_commands_are_found() -> None:
    assert len(BLOCKS) >= 60 and len(LINES) >= 100
    known = {"", "bash", "bibtex", "python", "yaml"}
    for page in PAGES:
        fences = re.findall(r"^ *```(\w*)", page.read_text(), re.MULTILINE)
        assert set(fences) <= known, f"{page}: a block of commands begins with ```bash"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_shell_can_read_the_blocks(page: Path) -> None:
    for block in BLOCKS:
        if block.page == page:
            command = ["bash", "-n", "-c", block.text]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", LINES)
def test_commands_would_start(line: str, check) -> None:
    check(LINES[line])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_of_the_pages_imports_what_exists(page: Path) -> None:
    """Of this package: others that pages use need not be installed."""
    for text in PYTHON.findall(page.read_text()):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and re.match(r"co_detr\b", ast.unparse(node)[5:]):
                module = importlib.import_module(node.module)
                missing = [name.name for name in node.names if not hasattr(module, name.name)]
                assert not missing, f"{node.module} has no {missing}"


def test_the_example_of_the_operator_runs() -> None:
    (text,) = [
        text
        for text in PYTHON.findall((ROOT / "docs" / "api.md").read_text())
        if "ms_deform_attn(" in text
    ]
    names: dict[str, object] = {}
    exec(text, names)
    assert names["sampled"].shape == (1, 100, 256)


@pytest.mark.parametrize(
    "line",
    [
        "python train_net.py --config-file configs/quickstart.py --resumed",
        "python tools/plot_results.py run --comparison other",
        "python -m benchmarks.detectors --config-file configs/quickstart.py --sizes 1x1",
        "co-detr predict --config-file quickstart.py --output drawn",
        "make quick",
        "pip install -r requirements-none.txt",
        "bash scripts/check_gpu.sh --rehearsal",
        "torchrun --nproc-per-node 2 train_net.py",
        "frobnicate",
        ".ci/run --fast",
    ],
)
def test_what_would_not_start_is_noticed(line: str, check) -> None:
    with pytest.raises((AssertionError, SystemExit, pytest.fail.Exception, OSError)):
        check(shlex.split(line))


def test_a_key_that_does_not_exist_is_noticed(check) -> None:
    for line in (
        "co-detr train --config-file quickstart train.max_iters=3",
        "make quickstart OPTS=model.auxiliaries=null",
        "python tools/inspect_data.py --config-file configs/co_detr_r50.py data.trains=a",
    ):
        with pytest.raises(co_detr.errors.ConfigError):
            check(shlex.split(line))
