"""The command `co-detr`: its subcommands, and the scripts that are the same by other names."""

import subprocess
import sys

import pytest

import co_detr
from co_detr.command_line import COMMANDS, main
from tests.paths import ROOT, python_path

SCRIPTS = {
    "train_net.py": "train",
    "predict.py": "predict",
    "demo.py": "demo",
    "tools/export.py": "export",
    "tools/convert_dataset.py": "convert",
    "tools/make_digits.py": "digits",
    "tools/split_dataset.py": "split",
    "tools/slice_dataset.py": "slice",
    "tools/pseudo_label.py": "pseudo-label",
    "tools/combine.py": "combine",
    "tools/average_checkpoints.py": "average",
    "tools/inspect_data.py": "inspect",
    "tools/analyze.py": "analyze",
    "tools/ablate.py": "ablate",
}


@pytest.fixture
def said(monkeypatch, capsys):
    """What `co-detr` with these arguments returns and prints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["co-detr", *arguments])
        code = main()
        return code, *capsys.readouterr()

    return run


def test_the_list_of_commands(said):
    for arguments in ((), ("--help",), ("-h",)):
        code, out, _ = said(*arguments)
        assert code == 0 and all(f"  {name} " in out for name in COMMANDS)
    assert said("--version")[1] == f"co_detr {co_detr.__version__}\n"
    code, out, error = said("trian")
    assert (code, out) == (2, "") and error.startswith("error: there is no command 'trian'")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_page_of_help_under_its_name(said, capsys, name):
    with pytest.raises(SystemExit) as ended:
        said(name, "--help")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: co-detr {name} ")


def test_eval_is_train_that_only_evaluates(said, monkeypatch):
    seen = []
    monkeypatch.setattr("co_detr.engine.command_line.run", seen.append)
    assert said("eval", "--config-file", "a.py", "train.seed=1")[0] == 0
    assert seen[0].eval_only and seen[0].opts == ["train.seed=1"]
    assert said("train", "--config-file", "a.py")[0] == 0 and not seen[1].eval_only


def test_an_error_of_the_user_is_one_sentence(said, tmp_path):
    code, _, error = said("train", "--config-file", str(tmp_path / "none.py"))
    assert code == 2 and error.count("\n") == 1 and error.startswith("error: config file")


def test_info(said):
    code, out, _ = said("info")
    assert code == 0 and f"{co_detr.__version__} from" in out and "MSDeformAttn" in out


@pytest.mark.parametrize(("script", "command"), SCRIPTS.items())
def test_scripts_are_commands_by_other_names(script, command):
    source = (ROOT / script).read_text(encoding="utf-8")
    assert f'start("{command}"' in source and len(source.splitlines()) < 25


def test_the_command_loads_nothing_slow():
    code = "import sys, co_detr.command_line; print({'torch', 'detectron2'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "set()", done.stderr


def test_what_messages_tell_users_to_start(monkeypatch, tmp_path):
    """The scripts of the repository; an installed package has the command alone."""
    for command, script in (("train", "train_net.py"), ("predict", "predict.py")):
        assert SCRIPTS[script] == command
        assert co_detr.program(command) == ["python", script]
    monkeypatch.setattr(co_detr, "__file__", str(tmp_path / "co_detr" / "__init__.py"))
    assert co_detr.program("predict") == ["co-detr", "predict"]
