"""What lets pip install the package anywhere: the extension, Detectron2, requirements."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import co_detr
from co_detr.command_line import main
from co_detr.errors import UserError
from co_detr.layers.deformable_attention import HAS_EXTENSION
from co_detr.tools import install_detectron2
from tests.paths import python_path


@pytest.mark.skipif(not HAS_EXTENSION, reason="built without the extension")
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10), reason="needs PyTorch 2.10"
)
def test_the_extension_is_for_every_python_and_pytorch():
    from co_detr import _C

    path = Path(_C.__file__)
    assert path.name == "_C.abi3.so"
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    listed = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True)
    wanted = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert any(name.startswith("torch_library_impl") for name in wanted)
    # Mangled names of at::, c10:: and torch:: are those of one PyTorch.
    assert not [name for name in wanted if re.match(r"_ZNK?(2at|3c10|5torch)", name)]


def without_detectron2(code: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code where Detectron2 is not installed."""
    hidden = f"import sys; sys.modules['detectron2'] = None\n{code}"
    return subprocess.run(
        [sys.executable, "-c", hidden],
        env={**os.environ, "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
    )


def test_without_detectron2_one_sentence_says_which_command_is_missing():
    result = without_detectron2("import co_detr; print(co_detr.__version__)")
    assert result.returncode == 0 and result.stdout == f"{co_detr.__version__}\n"
    assert "run `co-detr install-detectron2`" in result.stderr
    result = without_detectron2(
        "import warnings; warnings.simplefilter('ignore')\n"
        "from co_detr.command_line import main\n"
        "sys.argv = ['co-detr', 'inspect', '--config-file', 'quickstart']; sys.exit(main())"
    )
    assert result.returncode == 2
    assert result.stderr == f"error: {co_detr.WITHOUT_DETECTRON2}\n"


def test_a_detectron2_that_is_there_stays(monkeypatch, capsys):
    monkeypatch.setattr(install_detectron2, "_install", lambda: pytest.fail("it was installed"))
    monkeypatch.setattr(sys, "argv", ["co-detr", "install-detectron2"])
    assert main() == 0
    import detectron2

    folder = Path(detectron2.__file__).parent
    assert capsys.readouterr().out == f"Detectron2 is in {folder}, and stays as it is.\n"


def test_a_folder_of_that_name_is_no_detectron2(tmp_path, monkeypatch):
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    import detectron2

    assert install_detectron2.installed_detectron2() == str(Path(detectron2.__file__).parent)


def test_what_pip_is_asked_for(monkeypatch):
    asked = []

    def run(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(install_detectron2, "installed_detectron2", lambda: None)
    monkeypatch.setattr(install_detectron2.subprocess, "run", run)
    with pytest.raises(UserError, match="pip could not install Detectron2"):
        install_detectron2.run(install_detectron2.parse_arguments([]))
    (command,) = asked
    assert "--require-hashes" in command and "--no-deps" in command
    assert Path(command[-1]).read_text().count("--hash=sha256:") == 1


def test_a_detectron2_that_does_not_work_is_named(monkeypatch):
    broken = subprocess.CompletedProcess([], 1, stderr="Traceback ..\nImportError: no symbol x\n")
    monkeypatch.setattr(install_detectron2.subprocess, "run", lambda *a, **k: broken)
    with pytest.raises(UserError, match=r"cannot be imported \(ImportError: no symbol x\)"):
        install_detectron2.run(install_detectron2.parse_arguments([]))


def test_an_environment_without_pip_is_told(monkeypatch):
    monkeypatch.setattr(install_detectron2, "installed_detectron2", lambda: None)
    monkeypatch.setattr(install_detectron2.PathFinder, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="no pip to install Detectron2 with"):
        install_detectron2.run(install_detectron2.parse_arguments([]))
