"""What a folder holds before it becomes COCO format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from co_detr.conversion.image_size import ImageSize

SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


@dataclass(frozen=True)
class Example:
    """An image file with its label file; None: it has none, and so no objects."""

    image: Path
    label: Path | None


@dataclass(frozen=True)
class LabelledBox:
    """An object.

    Attributes:
        class_name: as in the data set.
        xyxy: in absolute pixels of the upright image; may reach out of it.
        crowd: a region that is neither learned nor counted in the evaluation.
    """

    class_name: str
    xyxy: tuple[float, float, float, float]
    crowd: bool = False


@dataclass(frozen=True)
class Remark:
    """Something odd about an image: what, in the plural, and what was done or can be done."""

    what: str
    mend: str


@dataclass(frozen=True)
class Labels:
    """What a label file says."""

    boxes: list[LabelledBox]
    remarks: list[Remark] = field(default_factory=list)


class Layout(Protocol):
    """A data set as it lies on disk.

    Attributes:
        splits: the examples of "train", "val" and "test", as far as there are such.
        class_names: in their order; None: those that occur, sorted.
        orphans: label files that belong to no image.
        notes: sentences about sets that were left out.
    """

    splits: dict[str, list[Example]]
    class_names: Sequence[str] | None
    orphans: list[Path]
    notes: list[str]

    def read(self, label: Path, size: ImageSize) -> Labels:
        """Reads a label file.

        Raises:
            DataError: in one sentence that names the file.
        """
        ...
