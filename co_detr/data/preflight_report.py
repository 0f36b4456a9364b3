"""What the preflight of a data set found, and how it is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from co_detr.data.coco_file import display_names
from co_detr.errors import DataError

Level = Literal["error", "warning"]
_LONGEST_LIST = 12  # class names shown before "and N more"


@dataclass(frozen=True)
class Finding:
    """One kind of defect in one split.

    Attributes:
        level: "error" stops the run; a "warning" is harmless or was repaired.
        split: "train" or "val".
        count: how many cases.
        what: the defect, in the plural.
        first: the first case.
        mend: what to do (error), or what was done and what to look at (warning).
    """

    level: Level
    split: str
    count: int
    what: str
    first: str
    mend: str

    def sentence(self) -> str:
        return f"{self.what}: {self.count} (the first: {self.first}); {self.mend}"


@dataclass
class SplitReport:
    """Counts of one annotation file, and what is wrong with it.

    Attributes:
        split: "train" or "val".
        file: path of the annotation file.
        images: number of images; `empty` of them have no box to learn or evaluate.
        boxes: usable boxes that are no crowd regions; `crowd` is the number of those.
        categories: (id in the file, name), in the order of the ids.
        decoded: number of images that were decoded.
        values: how values of more than 8 bits are read, one sentence for each range.
        sizes: how large objects are for the model, one sentence.
        suspicion: level of what is only likely, seen over the whole file.
    """

    split: str
    file: str
    images: int = 0
    empty: int = 0
    boxes: int = 0
    crowd: int = 0
    categories: list[tuple[int | str, str]] = field(default_factory=list)
    decoded: int = 0
    values: list[str] = field(default_factory=list)
    sizes: list[str] = field(default_factory=list)
    suspicion: Level = "error"
    findings: list[Finding] = field(default_factory=list)

    @property
    def class_names(self) -> list[str]:
        """Names as the model knows them, see `display_names`."""
        entries = [{"id": key, "name": name} for key, name in self.categories]
        return list(display_names(entries).values())

    def add(self, level: Level, cases: Sequence[str], what: str, mend: str) -> None:
        """Notes a defect if there are cases of it."""
        if cases:
            self.findings.append(Finding(level, self.split, len(cases), what, cases[0], mend))


@dataclass(frozen=True)
class PreflightReport:
    """The reports of all splits that were inspected."""

    splits: list[SplitReport]

    @property
    def findings(self) -> list[Finding]:
        """Errors first, otherwise in the order of the checks."""
        every = [finding for split in self.splits for finding in split.findings]
        return sorted(every, key=lambda finding: finding.level)

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]

    def text(self) -> str:
        """Tables of counts and of findings, one per line."""
        rows = [("", "images", "empty", "boxes", "crowd", "classes", "decoded", "file")]
        for split in self.splits:
            counts = (split.images, split.empty, split.boxes, split.crowd)
            counts += (len(split.categories), split.decoded)
            rows.append((split.split, *map(str, counts), split.file))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines += [f"classes: {_listed(self.splits[0].categories)}"]
        lines += [f"values: {each}" for split in self.splits for each in split.values]
        lines += [f"{split.split}: {each}" for split in self.splits for each in split.sizes]
        lines += [f"{each.level:7}  {each.split:5}  {each.sentence()}" for each in self.findings]
        if not self.findings:
            lines.append("no defects found")
        return printable("\n".join(lines))

    def raise_on_errors(self) -> None:
        """Raises a DataError with the first error, and the number of the others."""
        if not self.errors:
            return
        first = self.errors[0]
        file = next(split.file for split in self.splits if split.split == first.split)
        others = len(self.errors) - 1
        more = f" ({others} more kind{'s' * (others > 1)} of error above)" if others else ""
        raise DataError(printable(f"data.{first.split} {file} has {first.sentence()}{more}."))


def printable(text: str) -> str:
    """Text that any terminal can print: file names that are not UTF-8 get escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _listed(categories: list[tuple[int | str, str]]) -> str:
    shown = [f"{name} (id {key})" for key, name in categories[:_LONGEST_LIST]]
    more = len(categories) - len(shown)
    return ", ".join(shown + ([f"and {more} more"] if more else [])) or "none"
