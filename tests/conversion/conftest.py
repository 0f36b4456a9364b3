"""Runs the tool; the layouts are in folders.py."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from co_detr.tools.convert.command_line import parse_arguments, run


@dataclass(frozen=True)
class Result:
    """What the tool wrote and printed."""

    folder: Path
    printed: str

    def content(self, split: str) -> dict:
        return json.loads((self.folder / f"{split}.json").read_text())

    def boxes(self, split: str) -> dict[str, list[tuple]]:
        """(class name, x, y, width, height) by the name of the image file, without its folder."""
        content = self.content(split)
        names = {category["id"]: category["name"] for category in content["categories"]}
        boxes = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            boxes[annotation["image_id"]].append(
                (names[annotation["category_id"]], *annotation["bbox"])
            )
        return {Path(i["file_name"]).name: boxes[i["id"]] for i in content["images"]}


@pytest.fixture
def convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def call(source: Path, *options: str) -> Result:
        output = tmp_path / "coco"
        run(parse_arguments([str(source), "--output", str(output), *map(str, options)]))
        return Result(output, capsys.readouterr().out)

    return call
