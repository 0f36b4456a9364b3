"""Decisions that all processes of a run take together."""

from __future__ import annotations

from detectron2.utils import comm

from co_detr.errors import UserError


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
