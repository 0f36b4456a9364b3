"""What loading a checkpoint did, in a few lines with true numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from co_detr.checkpoint import shorten
from co_detr.checkpoint_classes import ClassMap
from co_detr.errors import CheckpointError

_NUM_LISTED = 6


@dataclass
class LoadReport:
    """Attributes:
    file: where the tensors come from.
    num_tensors: of the model (parameters and buffers).
    scope: what the file is for, if not the whole model, such as "backbone".
    ignored: official keys that have no place here -> why.
    classes: how class heads were carried over, if they were.
    kept: tensors that keep their initial values, each with the reason.
    unused: tensors of the file that nothing was done with.
    """

    file: str
    num_tensors: int
    scope: str = ""
    ignored: Mapping[str, str] = field(default_factory=dict)
    classes: ClassMap | None = None
    kept: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    @property
    def num_loaded(self) -> int:
        return self.num_tensors - len(self.kept)

    @property
    def complete(self) -> bool:
        """Whether the file and the model had the same tensors and classes."""
        remapped = self.classes is not None and bool(self.classes.new or self.classes.unused)
        return not (self.kept or self.unused or remapped)

    def text(self) -> str:
        """The report, at most some twenty lines."""
        what = f"tensors of the {self.scope or 'model'}"
        lines = [f"{self.file}: {self.num_loaded} of {self.num_tensors} {what} loaded."]
        lines += ignored_lines(self.ignored)
        if self.classes is not None:
            lines += _class_lines(self.classes)
        if self.kept:
            lines += [f"  {len(self.kept)} keep their initial values:", *_listed(self.kept)]
        if self.unused:
            lines += [f"  {len(self.unused)} of the file are not used:", *_listed(self.unused)]
        return "\n".join(lines)


def mismatch_error(problems: list[str], mend: str) -> CheckpointError:
    """The error of a checkpoint that does not fit: the first problems, and what to do."""
    shown = "; ".join(problems[:_NUM_LISTED])
    if len(problems) > _NUM_LISTED:
        shown += f"; and {len(problems) - _NUM_LISTED} more"
    return CheckpointError(f"the checkpoint does not fit the model ({shown}): {mend}.")


def ignored_lines(ignored: Mapping[str, str]) -> list[str]:
    """One line per reason why official tensors were left out."""
    return [
        f"  {number} of the file left out: {reason}"
        for reason, number in Counter(ignored.values()).items()
    ]


def _class_lines(classes: ClassMap) -> list[str]:
    lines = [
        f"  {len(classes.kept)} of {classes.num_ours} classes taken over by name, in "
        f"{len(classes.tensors)} tensors{_names(classes.kept)}"
    ]
    if classes.new:
        lines.append(f"  {len(classes.new)} start from initial values{_names(classes.new)}")
    if classes.unused:
        lines.append(
            f"  {len(classes.unused)} of {classes.num_theirs} classes of the file are not used"
            f"{_names(classes.unused)}"
        )
    return lines


def _names(names: list[str]) -> str:
    return f": {shorten(names, _NUM_LISTED)}" if names else ""


def _listed(entries: list[str]) -> list[str]:
    lines = [f"    {entry}" for entry in entries[:_NUM_LISTED]]
    if len(entries) > _NUM_LISTED:
        lines.append(f"    and {len(entries) - _NUM_LISTED} more")
    return lines
