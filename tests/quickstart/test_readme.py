"""What the README tells people to type must exist."""

import re
import shlex
from pathlib import Path

import pytest

from co_detr.engine.config import load_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def shell_commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = (shlex.split(line, comments=True) for line in lines)
    return [words for words in commands if words]


TRAINING_COMMANDS = [words for words in shell_commands() if "train_net.py" in words]


def test_commands_are_found() -> None:
    assert len(TRAINING_COMMANDS) >= 6


@pytest.mark.parametrize("words", TRAINING_COMMANDS, ids=" ".join)
def test_training_commands_have_a_config_and_valid_overrides(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    load_config(words[words.index("--config-file") + 1], overrides)


def test_mentioned_files_exist() -> None:
    mentioned = set(re.findall(r"\b(?:configs|tools|scripts|tests)/[\w./]*\w", README))
    assert len(mentioned) >= 6
    assert [name for name in sorted(mentioned) if not (ROOT / name).exists()] == []


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    used = {words[1] for words in shell_commands() if words[0] == "make"}
    assert used and used <= set(targets)
