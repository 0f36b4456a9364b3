"""Errors that a user can correct.

Each carries one sentence that names the file, image or key and says what to do; the command line
prints that sentence and exits with code 2, without a traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any


class UserError(ValueError):
    """Base of all errors that are explained in one sentence."""

    # True when all processes of a run raise the same error together, so that one of them reports.
    joint = False

    @property
    def sentence(self) -> str:
        """The message alone.

        An error raised in a data-loading worker reaches the main process with the worker's
        traceback in front of it; the message is then the last line, after the class name.
        """
        last_line = str(self).strip().splitlines()[-1]
        _, separator, message = last_line.partition(f"{type(self).__name__}: ")
        return message if separator else last_line


class ConfigError(UserError):
    """A config file, an override or a combination of settings is wrong."""


class DataError(UserError):
    """A data set, an annotation or an image is wrong."""


class CheckpointError(UserError):
    """A checkpoint is missing, unreadable or does not fit the model."""


class OutOfMemoryError(UserError):
    """The memory of the GPU or of the machine does not suffice for the settings."""


class NonFiniteError(UserError, FloatingPointError):
    """A loss, a gradient or a prediction became NaN or infinite; a step was not taken."""


class WriteError(UserError):
    """A file of the run cannot be written."""


class LostProcessError(UserError):
    """One of several processes is gone, so that the others cannot go on."""


class AnalysisError(UserError):
    """A measure does not know a part of the model that it has to look into."""


class ExportError(UserError):
    """A model cannot be exported, or an exported file is unreadable or differs from its model."""


def require_whole(key: str, value: Any, least: int = 1, or_null: str | None = None) -> None:
    """Raises a `ConfigError` unless a setting is a whole number of at least `least`.

    Args:
        key: what the user calls it.
        or_null: what null means, such as "for no limit", where it is allowed; "" says itself.
    """
    if value is None and or_null is not None:
        return
    if not (_is_a(Integral, value) and value >= least):
        null = "" if or_null is None else f", or null {or_null}".rstrip()
        raise ConfigError(f"{key}={value} must be a whole number of at least {least}{null}.")


def require_share(key: str, value: Any, most: float = 1) -> None:
    """Raises a `ConfigError` unless a setting is a number from 0 to `most`; see `require_whole`."""
    if not (_is_a(Real, value) and 0 <= value <= most):
        raise ConfigError(f"{key}={value} must be from 0 to {most:g}.")


def _is_a(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def first_line(error: Exception) -> str:
    """What another library's error says, to be quoted in a sentence; else the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def add_debug_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--debug`, for `exit_code`."""
    parser.add_argument(
        "--debug",
        action="store_true",
        default=os.environ.get("CO_DETR_DEBUG") == "1",
        help="show the traceback of errors that are otherwise one sentence (CO_DETR_DEBUG=1)",
    )


def exit_code(run: Callable[[], int | None], debug: bool = False) -> int:
    """Runs a tool of one process and prints the sentence of its `UserError` to stderr.

    Args:
        run: does the work; returns the exit code, or None for 0.
        debug: let the error through, so that its traceback shows.

    Returns:
        What `run` does, or 2 after a `UserError`.
    """
    try:
        return run() or 0
    except UserError as error:
        if debug:
            raise
        print(f"error: {error.sentence}", file=sys.stderr, flush=True)
        return 2
