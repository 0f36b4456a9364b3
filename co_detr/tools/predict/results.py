"""Detections in COCO format: of one image in memory, or of any number through files on disk.

A prediction of many images writes one line per image to ``predictions.parts/`` of its output
folder, in each of its processes, and makes one json of the lines in the end. Detections in memory
do not grow with the number of images, and a prediction that was killed goes on with the images that
have no line yet.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pycocotools.mask as mask_utils
from detectron2.structures import Instances

from co_detr.engine.evaluation import result_entries
from co_detr.errors import ConfigError, DataError
from co_detr.files import written_whole

JSON = "predictions.json"
PARTS = "predictions.parts"
_PLAN = "plan.json"
_PROBLEM = "problem"


@dataclass(frozen=True)
class Classes:
    """The classes of detections.

    Attributes:
        names: in the order of ``pred_classes``.
        ids: category ids that the json has for them.
        from_file: whether they are those of an annotation file.
    """

    names: Sequence[str]
    ids: Sequence[int | str]
    from_file: bool = False

    @classmethod
    def numbered(cls, names: Sequence[str]) -> Classes:
        """Category ids from 1 on, as those of the training data are not in a checkpoint."""
        return cls(names, range(1, len(names) + 1))

    @classmethod
    def like(cls, names: Sequence[str], categories: Mapping[int | str, str]) -> Classes:
        """Category ids of an annotation file if it has all of the names, else from 1 on."""
        by_name = {name: category_id for category_id, name in categories.items()}
        if not all(name in by_name for name in names):
            return cls.numbered(names)
        return cls(names, [by_name[name] for name in names], from_file=True)

    def categories(self) -> list[dict[str, Any]]:
        """As in a COCO-format file."""
        return [{"id": i, "name": name} for i, name in zip(self.ids, self.names, strict=True)]


@dataclass(frozen=True)
class ImageResult:
    """Entries of one image in a COCO-format file whose annotations have scores.

    Attributes:
        image: of ``images``.
        annotations: without their ids. They are those of COCO's result format, too, with masks in
            run-length form as ``segmentation`` (see `result_entries`); ``area`` is that of the
            mask, or else of the box.
    """

    image: dict[str, Any]
    annotations: list[dict[str, Any]]

    @classmethod
    def of(
        cls,
        image_id: int | str | None,
        file_name: str,
        found: Instances,
        classes: Classes,
        **details: Any,
    ) -> ImageResult:
        """From detections on the CPU; `details` go to the image's entry."""
        height, width = found.image_size
        image = {"id": image_id, "file_name": file_name, "width": width, "height": height}
        entries = result_entries(found, image_id)
        for entry in entries:
            _, _, box_width, box_height = entry["bbox"]
            entry["category_id"] = classes.ids[entry["category_id"]]
            entry |= {"area": box_width * box_height, "iscrowd": 0}
            if "segmentation" in entry:
                entry["area"] = int(mask_utils.area(entry["segmentation"]))
        return cls(image | details, entries)

    def content(self, classes: Classes) -> dict[str, list[dict[str, Any]]]:
        """A COCO-format file of this image alone."""
        annotations = [{"id": i} | entry for i, entry in enumerate(self.annotations, start=1)]
        categories = classes.categories()
        return {"images": [self.image], "categories": categories, "annotations": annotations}


@dataclass
class ResultParts:
    """Results of a prediction on disk, from which it can go on.

    Each process appends to a file of its own: a line has the number of the image, its entry, and
    its annotations, or why it could not be read. A line that a killed process left half written
    does not count.

    Args:
        output: the folder of the prediction.
        classes: of the detections.
        process: number of this process.

    Raises:
        ConfigError: from the first line on, if another prediction is writing to the folder.
    """

    output: Path
    classes: Classes
    process: int = 0

    def __post_init__(self) -> None:
        self._folder = self.output / PARTS
        self._file: Any = None

    @property
    def path(self) -> Path:
        """Of the json."""
        return self.output / JSON

    def begin(self, plan: Mapping[str, Any], goes_on: bool) -> set[int]:
        """Goes on with what is in the folder, or begins; for the main process, before all others.

        Args:
            plan: by name, what the results depend on.
            goes_on: whether what is in the folder can be gone on with.

        Returns:
            the numbers of the images that are done. Those that could not be read are not.

        Raises:
            ConfigError: if the folder has parts of a prediction with another plan.
        """
        file = self._folder / _PLAN
        if file.is_file():
            before = json.loads(file.read_text(encoding="utf-8"))
            now = json.loads(json.dumps(plan))  # as it was read
            changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            if changed:
                raise ConfigError(
                    f"{self._folder} has a part of another prediction, which differs in "
                    f"{', '.join(changed)}: give the same arguments to go on with it, or remove "
                    "the folder, or choose another --output."
                )
            if goes_on:
                return {number for number, problem, _, _ in self._index() if not problem}
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        with written_whole(str(file)) as written:
            json.dump(plan, written)
        return set()

    def add(
        self,
        number: int,
        image_id: int | str | None,
        file_name: str,
        found: Instances,
        **details: Any,
    ) -> None:
        """Writes the detections of an image; `details` go to its entry.

        Args:
            number: of the image, from 0, which orders them.
            image_id: None: to be numbered in the end, from 1.
            found: on the CPU.
        """
        result = ImageResult.of(image_id, file_name, found, self.classes, **details)
        self._append(number, json.dumps(result.image), json.dumps(result.annotations))

    def add_problem(self, number: int, sentence: str) -> None:
        """Writes why an image could not be read."""
        self._append(number, _PROBLEM, json.dumps(sentence))

    def write(self) -> tuple[int, list[str]]:
        """Makes one json of all parts, whole or not at all.

        Returns:
            how many images are in it, and the sentences of those that are not, in their order.
        """
        # For each number where its line begins and in which file; in arrays, as there may be
        # millions.
        starts, files, names = array("q"), array("h"), []
        for number, problem, name, start in self._index():
            while len(starts) <= number:
                starts.append(-1)
                files.append(-1)
            if name not in names:
                names.append(name)
            if not (problem and starts[number] >= 0):  # an image may have been mended
                starts[number], files[number] = start, names.index(name)
        opened = [open(name, "rb") for name in names]

        def lines() -> Iterator[tuple[str, str]]:
            for start, which in zip(starts, files, strict=True):
                if start >= 0:
                    opened[which].seek(start)
                    _, image, rest = opened[which].readline().decode().split("\t")
                    yield image, rest

        def images() -> Iterator[dict[str, Any]]:
            results = (json.loads(image) for image, _ in lines() if image != _PROBLEM)
            for position, image in enumerate(results, start=1):
                yield image if image["id"] is not None else image | {"id": position}

        def annotations() -> Iterator[dict[str, Any]]:
            found = (json.loads(rest) for image, rest in lines() if image != _PROBLEM)
            number = 0
            for position, entries in enumerate(found, start=1):
                for entry in entries:
                    number += 1
                    if entry["image_id"] is None:
                        entry["image_id"] = position
                    yield {"id": number} | entry

        try:
            with written_whole(str(self.path)) as file:
                file.write('{"images": [')
                num_images = _write_list(file, images())
                file.write(f'], "categories": {json.dumps(self.classes.categories())}')
                file.write(', "annotations": [')
                _write_list(file, annotations())
                file.write("]}")
            problems = [json.loads(rest) for image, rest in lines() if image == _PROBLEM]
        finally:
            for part in opened:
                part.close()
        return num_images, problems

    def close(self) -> None:
        """Lets others append."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Removes the parts."""
        self.close()
        shutil.rmtree(self._folder)

    def _append(self, number: int, image: str, rest: str) -> None:
        if self._file is None:
            self._file = self._open()
        # JSON has no tabs and line breaks outside of its own escapes.
        self._file.write(f"{number}\t{image}\t{rest}\n".encode())
        self._file.flush()  # to the system, so that it outlives this process

    def _open(self) -> Any:
        file = open(self._folder / f"{self.process}.jsonl", "a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise ConfigError(
                f"another prediction is writing to {self.output}: wait until it ends or stop it, "
                "or choose another --output."
            ) from error
        end = 0
        file.seek(0)
        for line in file:
            end += len(line) if line.endswith(b"\n") else 0
        file.truncate(end)
        return file

    def _index(self) -> Iterator[tuple[int, bool, Path, int]]:
        """Of each line the number of its image, whether it is a problem, and where it begins."""
        for path in sorted(self._folder.glob("*.jsonl")):
            start = 0
            with open(path, "rb") as file:
                for line in file:
                    if line.endswith(b"\n"):
                        yield *_begin_of(line, path), path, start
                    start += len(line)


def _begin_of(line: bytes, path: Path) -> tuple[int, bool]:
    number, _, rest = line.partition(b"\t")
    if not number.isdigit() or rest.count(b"\t") != 1:
        raise DataError(
            f"{path} has a line that no prediction wrote: remove the folder {path.parent}, and "
            "start again."
        )
    return int(number), rest.startswith(_PROBLEM.encode())


def _write_list(file: Any, entries: Iterable[Mapping[str, Any]]) -> int:
    number = 0
    for number, entry in enumerate(entries, start=1):
        file.write(f"{', ' * (number > 1)}{json.dumps(entry)}")
    return number
