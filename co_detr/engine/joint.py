"""Decisions that all processes of a run take together."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from detectron2.utils import comm

from co_detr.errors import UserError, WriteError

T = TypeVar("T")


def jointly(do: Callable[[], T]) -> T:
    """Lets the main process do something, and all know the result; every process has to call this.

    Raises:
        UserError: in all processes, if the main process raises one or a file cannot be written.
    """
    result, problem = None, None
    if comm.is_main_process():
        try:
            result = do()
        except UserError as error:
            problem = error
        except OSError as error:
            name = error.filename or "a file of the run"
            problem = WriteError(
                f"{name} cannot be written ({error.strerror or os.strerror(error.errno or 0)}): "
                "make room or correct the permissions, and start again."
            )
            problem.__cause__ = error
    raise_jointly(problem)
    return comm.all_gather(result)[0]


def raise_jointly(error: UserError | None) -> None:
    """Raises in every process what one of them found; every process has to call this.

    A process that raised alone would leave the others waiting for it.

    Args:
        error: this process's, or None. The one of the lowest rank is raised.
    """
    for found in comm.all_gather(None if error is None else (type(error), str(error))):
        if found is not None:
            kind, message = found
            joint = kind(message)
            joint.joint = True
            raise joint from error
