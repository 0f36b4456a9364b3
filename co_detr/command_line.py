"""The command `co-detr`, and what every program of the project does before it works.

    co-detr train --config-file configs/co_detr_r50.py --num-gpus 8
    co-detr predict co_detr_r50 --checkpoint model_final.pth street.jpg --output drawn

A subcommand is a module with ``parse_arguments(argv)`` and ``run(options)``. The scripts of the
repository (`train_net.py`, `predict.py`, `tools/*.py`) are the same subcommands by other names.
Nothing heavy is imported here, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

import co_detr
from co_detr.errors import exit_code
from co_detr.process_setup import silence_dependencies

# Here, so that processes which a training starts, and which import its script again, have it, too.
# OpenMP threads that wait for work spin for long by default. Where a data worker or another program
# shares the cores, that makes a step several times slower. It must be set before torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
silence_dependencies()


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        module: with ``parse_arguments`` and ``run``.
        summary: what it does, in a few words.
        first: arguments that stand before the user's.
    """

    module: str
    summary: str
    first: Sequence[str] = ()


_TRAIN = "co_detr.engine.command_line"
COMMANDS = {
    "train": Command(_TRAIN, "train a model"),
    "eval": Command(_TRAIN, "evaluate a model, as train --eval-only does", ["--eval-only"]),
    "predict": Command("co_detr.tools.predict.command_line", "detect objects in images and videos"),
    "demo": Command("co_detr.tools.demo.command_line", "a web page that shows what is detected"),
    "export": Command("co_detr.tools.export.command_line", "ONNX or torch.export of a model"),
    "convert": Command("co_detr.tools.convert.command_line", "YOLO or VOC folder to COCO format"),
    "digits": Command("co_detr.tools.digits", "make the data of the quick start"),
    "split": Command("co_detr.tools.split_dataset", "divide a data set into folds"),
    "slice": Command("co_detr.tools.slice_dataset", "cut a data set into tiles"),
    "pseudo-label": Command("co_detr.tools.pseudo_label", "make annotations of detections"),
    "combine": Command("co_detr.tools.combine.command_line", "fuse detections of several models"),
    "average": Command("co_detr.tools.average_checkpoints", "average checkpoints of one run"),
    "inspect": Command("co_detr.tools.inspect_data", "check a data set, and draw samples of it"),
    "card": Command("co_detr.tools.model_card", "a model card of a run, as the hub reads it"),
    "analyze": Command("co_detr.tools.analyze.command_line", "measure what trained models do"),
    "ablate": Command("co_detr.tools.ablate.command_line", "train the variants of a grid"),
    "info": Command("co_detr.tools.collect_env", "what is installed, for a bug report"),
    "install-detectron2": Command(
        "co_detr.tools.install_detectron2", "add Detectron2, unless there is one"
    ),
}


def main() -> int:
    """The command `co-detr`; returns its exit code."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if name == "--version":
        print(f"co_detr {co_detr.__version__}")
        return 0
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}: co-detr --help lists them.", file=sys.stderr)
        return 2
    return start(name, arguments, program=f"co-detr {name}")


def start(command: str, arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Runs a subcommand with the arguments of the process, or others; returns its exit code.

    Args:
        program: what its help calls it; by default the script that was started.
    """
    chosen = COMMANDS[command]
    given = list(sys.argv[1:] if arguments is None else arguments)
    if program is not None:
        sys.argv[0] = program  # what argparse calls the program
    try:
        module = import_module(chosen.module)
        options = module.parse_arguments([*chosen.first, *given])
        return exit_code(lambda: module.run(options), getattr(options, "debug", False))
    except ModuleNotFoundError:
        if not co_detr.lacks_detectron2():
            raise
        print(f"error: {co_detr.WITHOUT_DETECTRON2}", file=sys.stderr)
        return 2


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: co-detr COMMAND ...",
            "",
            *lines,
            "",
            "co-detr COMMAND --help says more; co-detr --version.",
        ]
    )
