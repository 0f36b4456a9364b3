"""scripts/setup.sh, with interpreters that only write down what they are asked to do; setup.py."""

import os
import runpy
import subprocess
from pathlib import Path

import pytest
import setuptools
import torch

ROOT = Path(__file__).parents[2]

# Answers like an environment that has torch 9.9.
COMPLETE_PYTHON = """#!/bin/sh
echo "$@" >>"$CALLS"
case "$*" in
    *m.version*) echo 9.9 ;;
esac
"""
OLD_PYTHON = """#!/bin/sh
[ "$1" = --version ] && echo "Python 3.8.1" && exit 0
exit 1
"""


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def run_setup(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": os.environ["PATH"],
        "VENV": str(tmp_path / "venv"),
        "CALLS": str(tmp_path / "calls"),
        **variables,
    }
    command = ["bash", str(ROOT / "scripts" / "setup.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def calls(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_missing_and_old_interpreters_are_named(tmp_path: Path) -> None:
    missing = run_setup(tmp_path, PYTHON="no-such-python")
    assert missing.returncode == 1
    assert "'no-such-python' was not found; install Python 3.10 or newer" in missing.stderr
    old = run_setup(tmp_path, PYTHON=str(write_script(tmp_path / "old", OLD_PYTHON)))
    assert old.returncode == 1
    assert "Python 3.8.1 is too old; Co-DETR needs Python 3.10 or newer" in old.stderr
    assert not (tmp_path / "venv").exists()


def test_missing_compiler_is_named_before_anything_is_installed(tmp_path: Path) -> None:
    write_script(tmp_path / "venv" / "bin" / "python", COMPLETE_PYTHON)
    result = run_setup(tmp_path, CXX="no-such-compiler")
    assert result.returncode == 1
    assert "compiler 'no-such-compiler' was not found; install g++" in result.stderr
    assert not any("pip" in call for call in calls(tmp_path))


def test_an_existing_environment_keeps_torch(tmp_path: Path) -> None:
    write_script(tmp_path / "venv" / "bin" / "python", COMPLETE_PYTHON)
    result = run_setup(tmp_path, CO_DETR_NO_EXT="1")
    assert result.returncode == 0, result.stderr
    assert "keep torch 9.9" in result.stdout
    assert any(call.endswith("-m co_detr install-detectron2") for call in calls(tmp_path))
    installs = [call for call in calls(tmp_path) if "pip install" in call]
    assert len(installs) == 2  # the other requirements, and this package
    assert "-r requirements.txt" in installs[0] and "-e ." in installs[1]
    assert not any("constraints.txt" in call for call in installs)


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="a GPU is here")
@pytest.mark.parametrize(
    ("variables", "built"),
    [({}, "CPU only"), ({"FORCE_CUDA": "1"}, "all"), ({"TORCH_CUDA_ARCH_LIST": "9.0"}, "all")],
    ids=str,
)
def test_without_a_gpu_only_who_asks_waits_for_cuda_kernels(tmp_path, variables, built) -> None:
    (tmp_path / "Python.h").touch()
    asked = f"""case "$*" in
    *sysconfig*) echo {tmp_path} ;;
    *-e*.) echo "CO_DETR_NO_CUDA=$CO_DETR_NO_CUDA" >>"$CALLS" ;;
esac
"""
    write_script(tmp_path / "venv" / "bin" / "python", COMPLETE_PYTHON + asked)
    result = run_setup(tmp_path, **variables)
    assert result.returncode == 0, result.stderr
    cpu_only = built == "CPU only"
    assert ("FORCE_CUDA=1 builds CUDA's, too" in result.stdout) == cpu_only
    assert f"CO_DETR_NO_CUDA={'1' if cpu_only else ''}" in calls(tmp_path)
    # That no GPU was here is no switch that somebody set.
    assert run_setup(tmp_path).stdout == f"setup: {tmp_path / 'venv'} is up to date\n"


def test_second_run_does_nothing_until_a_switch_changes(tmp_path: Path) -> None:
    write_script(tmp_path / "venv" / "bin" / "python", COMPLETE_PYTHON)
    run_setup(tmp_path, CO_DETR_NO_EXT="1")
    first = calls(tmp_path)
    # The switch is remembered: leaving it out is no change.
    for variables in ({"CO_DETR_NO_EXT": "1"}, {}):
        again = run_setup(tmp_path, **variables)
        assert again.returncode == 0
        assert again.stdout == f"setup: {tmp_path / 'venv'} is up to date\n"
        assert calls(tmp_path) == first
    run_setup(tmp_path, CO_DETR_NO_EXT="1", TORCH_CUDA_ARCH_LIST="9.0")
    assert len(calls(tmp_path)) > len(first)


def test_failed_phase_shows_the_log_and_is_repeated(tmp_path: Path) -> None:
    failing = COMPLETE_PYTHON + 'case "$*" in *-e*.) echo "the reason"; exit 1 ;; esac\n'
    python = write_script(tmp_path / "venv" / "bin" / "python", failing)
    result = run_setup(tmp_path, CO_DETR_NO_EXT="1")
    assert result.returncode == 1
    assert "the reason" in result.stderr
    assert f"whole log: {tmp_path / 'venv' / 'setup.log'}" in result.stderr
    write_script(python, COMPLETE_PYTHON)
    assert "ready after" in run_setup(tmp_path, CO_DETR_NO_EXT="1").stdout


@pytest.mark.parametrize("target", ["help", "setup", "quickstart", "test", "lint", "docs", "clean"])
def test_makefile_has_the_target(target: str) -> None:
    command = ["make", "--dry-run", "--directory", str(ROOT), target]
    assert subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def setup_file(monkeypatch) -> dict:
    """What setup.py defines, without setting anything up."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.setenv("CO_DETR_NO_EXT", "1")
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    ("toolkit", "of_torch", "expected"),
    [
        ((11, 8), (11, 8), "7.5;8.0;9.0+PTX"),
        ((11, 4), (11, 8), "7.5;8.0+PTX"),
        ((12, 4), (12, 4), "7.5;8.0;9.0+PTX"),
        ((12, 8), (12, 8), "7.5;8.0;9.0;10.0;12.0+PTX"),
        ((13, 0), (13, 0), "7.5;8.0;9.0;10.0;12.0+PTX"),
        ((12, 9), (12, 4), "7.5;8.0;9.0+PTX"),  # torch's own list of names is as old as torch
        ((12, 4), (12, 8), "7.5;8.0;9.0+PTX"),
    ],
)
def test_default_architectures_are_those_that_toolkit_and_torch_know(
    setup_file, toolkit, of_torch, expected
):
    assert setup_file["default_architectures"](toolkit, of_torch) == expected


def make_toolkit(tmp_path: Path, printed: str) -> str:
    write_script(tmp_path / "cuda" / "bin" / "nvcc", f"#!/bin/sh\necho '{printed}'\n")
    header = tmp_path / "cuda" / "include" / "cuda_runtime_api.h"
    header.parent.mkdir()
    header.touch()
    return str(tmp_path / "cuda")


@pytest.mark.parametrize(
    ("named", "expected"), [("", "7.5;8.0;9.0+PTX"), ("8.6", "8.6")], ids=["default", "named"]
)
def test_extension_is_built_for_what_was_named_or_the_default(
    setup_file, tmp_path, monkeypatch, named, expected
):
    toolkit = make_toolkit(tmp_path, "Cuda compilation tools, release 12.6, V12.6.20")
    monkeypatch.setenv("CUDA_HOME", toolkit)
    monkeypatch.delenv("CO_DETR_NO_CUDA", raising=False)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", named)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(setup_file["cpp_extension"], "CUDA_HOME", toolkit)
    setup_file["extension"]()
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == expected


def test_a_toolkit_without_a_version_is_named(setup_file, tmp_path):
    toolkit = make_toolkit(tmp_path, "broken")
    with pytest.raises(SystemExit, match="nvcc --version names no release .*set CUDA_HOME"):
        setup_file["toolkit_version"](toolkit)
