"""One row of the table of models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ZooEntry:
    """One model.

    Attributes:
        name: of the file in ``configs``, without ``.py``.
        summary: what it is, in a few words.
        official_config: its counterpart below ``projects/configs`` of the reference; None: ours.
        ap: box AP (0 to 100) on the val set of ``dataset`` that the reference reports; None: none
            reported.
        dataset: what the model detects the classes of.
        parameters: published number of parameters in millions, with what it counts; "": none.
        note: how the config differs from the official one, or what that one leaves open.
        checkpoint: file name of the released weights; None: none released.
        page: where a person can fetch that file.
        url: where a program can fetch it; None: only by hand.
        sha256: of the file, in hexadecimal; goes with ``url``.
    """

    name: str
    summary: str
    official_config: str | None = None
    ap: float | None = None
    dataset: str = "COCO"
    parameters: str = ""
    note: str = ""
    checkpoint: str | None = None
    page: str | None = None
    url: str | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        if (self.url is None) != (self.sha256 is None):
            raise ValueError(f"{self.name}: a url needs a sha256, and a sha256 a url")
        if (self.checkpoint is None) != (self.page is None):
            raise ValueError(f"{self.name}: a checkpoint needs a page, and a page a checkpoint")
