"""The contestants: this project's configs and the peers that are installed."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from benchmarks.common.environment import ROOT, commit

FAMILY = "configs/co_deformable_detr"


@dataclass(frozen=True)
class Contestant:
    """Something to measure, described so that a worker process can build it.

    Attributes:
        name: in tables; without spaces.
        about: one line for the legend.
        kind: who builds it.
        config: ``co_detr`` only: config file, relative to ``root``; ``overrides``: of its keys.
        sequential: ``co_detr`` only: decode every query group in a pass of its own.
        wide: ``transformers`` only: with this project's sizes instead of the published ones.
        root: checkout whose ``co_detr`` package is used.
    """

    name: str
    about: str
    kind: Literal["co_detr", "transformers"] = "co_detr"
    config: str = ""
    overrides: tuple[str, ...] = ()
    sequential: bool = False
    wide: bool = False
    root: str = str(ROOT)

    def config_file(self) -> Path:
        """The config; where a checkout of another commit has it in another folder, by its name.

        Raises:
            FileNotFoundError: if that checkout has no such config.
        """
        path = Path(self.root, self.config)
        if path.is_file():
            return path
        elsewhere = sorted(Path(self.root, "configs").rglob(path.name))
        if len(elsewhere) != 1:
            raise FileNotFoundError(f"{self.root} has no config {path.name}, or several")
        return elsewhere[0]


BUILT_IN = {
    contestant.name: contestant
    for contestant in (
        Contestant("k0", "no auxiliary head", config=f"{FAMILY}/deformable_detr_r50.py"),
        Contestant("k1", "ATSS", config=f"{FAMILY}/co_detr_r50_atss.py"),
        Contestant("k2", "Faster R-CNN and ATSS", config="configs/co_detr_r50.py"),
        Contestant(
            "k2-sequential",
            "k2 with one decoder pass per query group",
            config="configs/co_detr_r50.py",
            sequential=True,
        ),
        Contestant(
            "transformers",
            "Hugging Face Deformable-DETR, two-stage, as published (feed-forward 1024, "
            "no intermediate-layer losses)",
            kind="transformers",
        ),
        Contestant(
            "transformers-wide",
            "the same with this project's sizes (feed-forward 2048, losses of all layers)",
            kind="transformers",
            wide=True,
        ),
    )
}
DEFAULT = ("k0", "k1", "k2", "k2-sequential", "transformers")
TRAINING_ONLY = ("k2-sequential",)  # inference decodes one group


def parse_added(text: str) -> Contestant:
    """Reads "NAME CONFIG [KEY=VALUE ...]", quoted as for a shell.

    Raises:
        ValueError: without a name and a config file.
    """
    words = shlex.split(text)
    if len(words) < 2 or "=" in words[0] or "=" in words[1]:
        raise ValueError(f'--add {text!r} must be "NAME CONFIG [KEY=VALUE ...]".')
    name, config, *overrides = words
    about = " ".join([config, *overrides])
    return Contestant(name, about, config=config, overrides=tuple(overrides))


def from_other_checkout(contestant: Contestant, root: Path) -> Contestant:
    """The same contestant as the checkout at ``root`` computes it."""
    return replace(
        contestant,
        name=f"{contestant.name}@{root.name}",
        about=f"{contestant.name} of {root.name}, commit {commit(root)}",
        root=str(root),
    )


def has_transformers(python: str) -> bool:
    """Whether the interpreter ``python`` finds transformers and torch."""
    code = (
        "import importlib.util as u, sys; "
        "sys.exit(not all(map(u.find_spec, ('torch', 'transformers'))))"
    )
    return subprocess.run([python, "-c", code], capture_output=True).returncode == 0
