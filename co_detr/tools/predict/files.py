"""What predict.py reads and writes: inputs and videos, drawn pictures and one json.

Files that cannot be read do not stop the others. Videos need OpenCV, which is optional.
"""

from __future__ import annotations

import glob
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pycocotools.mask as mask_utils
from detectron2.structures import Instances
from PIL import Image
from tqdm import tqdm

from co_detr.engine.evaluation import result_entries
from co_detr.errors import ConfigError, DataError
from co_detr.files import written_whole
from co_detr.tools.draw.boxes import Box, class_colors, draw_picture
from co_detr.tools.draw.fonts import fonts_for
from co_detr.tools.predict.predictor import Predictor, Sample

VIDEOS = frozenset((".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv"))
JSON = "predictions.json"
_LISTED = 8  # names of files in a message
_JPEG_QUALITY = 92
_FALLBACK_RATE = 25.0  # frames per second of a video that does not say


@dataclass(frozen=True)
class Inputs:
    """Attributes:
    files: each once, in the order of the command line, sorted within a folder or pattern.
    problems: one sentence for each input that stands for no file.
    passed_over: files of folders and patterns that are of another kind.
    """

    files: list[Path]
    problems: list[str]
    passed_over: list[Path]

    def remark(self) -> str:
        """One line about the files that are passed over, of which there have to be some."""
        return (
            f"Passed over {_listed(self.passed_over)} of kinds that are not read; images among "
            "them have to be converted, for example to JPEG."
        )


def find_inputs(arguments: Sequence[str], suffixes: Collection[str], output: Path) -> Inputs:
    """Resolves files, folders (searched with their subfolders) and patterns such as ``a/*.jpg``.

    A file that is named itself is taken whatever its suffix is. Of folders and patterns only files
    with one of `suffixes` are, in upper or lower case, no hidden ones, and nothing below `output`:
    that holds the pictures of earlier runs.

    Raises:
        DataError: if the inputs stand for no file at all.
    """
    files: dict[Path, None] = {}
    others: dict[Path, None] = {}
    problems: list[str] = []
    for argument in arguments:
        is_named = os.path.isfile(argument)
        found, rest = [], []
        for path in _resolve(argument, output):
            (found if is_named or path.suffix.lower() in suffixes else rest).append(path)
        if not found:
            problems.append(_explain(argument, rest))
        files.update(dict.fromkeys(found))
        others.update(dict.fromkeys(rest))
    if not files:
        raise DataError(f"nothing to read: {' '.join(problems)}")
    return Inputs(list(files), problems, [path for path in others if path not in files])


def _resolve(argument: str, output: Path) -> list[Path]:
    """All files, of whatever kind, that an argument stands for."""
    path = Path(argument)
    if path.is_file():
        return [path]
    if path.is_dir():
        candidates = [file for file in path.rglob("*") if not _is_hidden(file.relative_to(path))]
    else:
        candidates = [Path(name) for name in glob.glob(argument, recursive=True)]
    return sorted(path for path in candidates if path.is_file() and not _is_below(path, output))


def _explain(argument: str, others: list[Path]) -> str:
    there = f", only {_listed(others)}" if others else ""
    if os.path.isdir(argument):
        return f"the folder {argument} has no file of a kind that is read{there}."
    if glob.has_magic(argument):
        return f"no file of a kind that is read matches {argument}{there}."
    return f"{argument} does not exist."


def _listed(paths: list[Path]) -> str:
    names = ", ".join(path.name for path in paths[:_LISTED])
    more = f" and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
    return f"{len(paths)} file{'s' * (len(paths) != 1)} ({names}{more})"


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _is_below(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents


def predict_images(predictor: Predictor, files: list[Path], output: OutputFolder) -> list[str]:
    """Draws and collects the detections of image files, numbered from 1 in their order.

    Returns:
        One sentence for each file that could not be read.
    """
    unreadable: list[str] = []
    with tqdm(total=len(files), unit="image") as bar:

        def readable() -> Iterator[tuple[int, Sample]]:
            for number, path in enumerate(files, start=1):
                try:
                    sample = predictor.prepare(path)
                except DataError as error:
                    unreadable.append(error.sentence)
                    bar.update()
                else:
                    yield number, sample

        for number, sample, found in predictor.stream(readable()):
            output.add_image(number, files[number - 1], sample.rgb, found)
            bar.update()
    return unreadable


def predict_videos(predictor: Predictor, files: list[Path], output: OutputFolder) -> list[str]:
    """Draws and collects the detections of every frame of video files.

    The frames of all videos are numbered on; their entries have ``frame``, from 0 in each video.

    Returns:
        One sentence for each video that could not be read to its end.
    """
    unreadable: list[str] = []
    for path in files:
        try:
            _predict_video(predictor, path, output)
        except DataError as error:
            unreadable.append(error.sentence)
    return unreadable


def _predict_video(predictor: Predictor, path: Path, output: OutputFolder) -> None:
    reader = VideoReader(path)
    name = output.free_name(path, ".mp4")
    writer = VideoWriter(output.folder / name, reader.rate)
    frames = tqdm(reader, total=reader.num_frames or None, unit="frame", desc=path.name)
    try:
        # All frames have one size, so that they come back in their order.
        for frame, sample, found in predictor.stream(_prepared(predictor, frames)):
            number = len(output.results) + 1
            output.results.add(number, str(path), found, frame=frame, picture=name)
            writer.add(np.asarray(output.draw(sample.rgb, found)))
        reader.require_complete()
    finally:
        frames.close()
        writer.close()


def _prepared(predictor: Predictor, frames: Iterable[np.ndarray]) -> Iterator[tuple[int, Sample]]:
    for number, frame in enumerate(frames):
        yield number, predictor.prepare(frame)


class OutputFolder:
    """Draws detections and collects them for ``predictions.json``.

    Raises:
        ConfigError: if the folder cannot be made.
    """

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the output folder {folder} cannot be made ({error.strerror}): choose another "
                "--output."
            ) from error
        self.folder = folder
        self.results = CocoResults(class_names)
        self._names = list(class_names)
        fonts_for("".join(class_names))  # warns of all letters without a font at once
        self._colors = class_colors(class_names)
        self._taken: set[str] = set()

    def add_image(self, image_id: int, path: Path, rgb: np.ndarray, found: Instances) -> None:
        """Writes the picture of an image file."""
        name = self.free_name(path, ".jpg")
        self.draw(rgb, found).save(self.folder / name, quality=_JPEG_QUALITY)
        self.results.add(image_id, str(path), found, picture=name)

    def draw(self, rgb: np.ndarray, found: Instances) -> Image.Image:
        """The picture of an image ``(H, W, 3)`` uint8 RGB with detections in its pixels."""
        masks = found.pred_masks.patches() if found.has("pred_masks") else [None] * len(found)
        boxes = [
            Box.of_corners(corners, self._names[label], score, mask)
            for corners, label, score, mask in zip(
                found.pred_boxes.tensor.tolist(),
                found.pred_classes.tolist(),
                found.scores.tolist(),
                masks,
                strict=True,
            )
        ]
        return draw_picture(rgb, boxes, self._colors)

    def free_name(self, path: Path, suffix: str) -> str:
        """A file name like that of `path`, with a number if another input had the same."""
        name, number = f"{path.stem}{suffix}", 1
        while name.casefold() in self._taken:  # some systems do not tell A.jpg from a.jpg
            number += 1
            name = f"{path.stem}_{number}{suffix}"
        self._taken.add(name.casefold())
        return name

    def save(self) -> Path:
        """Writes the json of all that was added."""
        path = self.folder / JSON
        self.results.save(path)
        return path


class CocoResults:
    """Collects detections; `content` is an annotation file whose annotations have scores.

    The entries of ``annotations`` are those of COCO's result format too, with masks in run-length
    form as ``segmentation`` (see `result_entries`); ``area`` is that of the mask, or else of the
    box. Categories are numbered from 1 in the order of the checkpoint's classes, whose ids in the
    training data it does not know.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self._names = list(class_names)
        self._images: dict[int, dict[str, Any]] = {}
        self._found: dict[int, list[dict[str, Any]]] = {}

    def __len__(self) -> int:
        return len(self._images)

    def add(self, image_id: int, file_name: str, found: Instances, **details: Any) -> None:
        """Adds an image with its detections, on the CPU; `details` go to its image entry."""
        height, width = found.image_size
        self._images[image_id] = {
            "id": image_id,
            "file_name": file_name,
            "width": width,
            "height": height,
        } | details
        entries = result_entries(found, image_id)
        for entry in entries:
            _, _, box_width, box_height = entry["bbox"]
            entry["category_id"] += 1
            entry |= {"area": box_width * box_height, "iscrowd": 0}
            if "segmentation" in entry:
                entry["area"] = int(mask_utils.area(entry["segmentation"]))
        self._found[image_id] = entries

    def content(self) -> dict[str, list[dict[str, Any]]]:
        """``images``, ``categories`` and ``annotations``, in the order of the image ids."""
        order = sorted(self._images)
        annotations = [entry for image_id in order for entry in self._found[image_id]]
        return {
            "images": [self._images[image_id] for image_id in order],
            "categories": [{"id": i, "name": name} for i, name in enumerate(self._names, start=1)],
            "annotations": [{"id": i} | entry for i, entry in enumerate(annotations, start=1)],
        }

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        with written_whole(str(path)) as file:
            json.dump(self.content(), file)


def require_opencv() -> ModuleType:
    """OpenCV's module.

    Raises:
        ConfigError: if it is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise ConfigError(
            f"--video needs OpenCV, which cannot be imported ({error}): install it with "
            "pip install opencv-python-headless."
        ) from error
    return cv2


class VideoReader:
    """Frames of a video file, upright, one after the other.

    Attributes:
        rate: frames per second.
        num_frames: as the file states it; 0 if it does not.

    Raises:
        DataError: if the file cannot be opened as a video.
    """

    def __init__(self, path: Path) -> None:
        self._cv2 = require_opencv()
        self._path = path
        self._num_read = 0
        self._capture = self._cv2.VideoCapture(str(path))
        if not self._capture.isOpened():
            raise DataError(f"video {path} cannot be opened: replace the file.")
        rate = self._capture.get(self._cv2.CAP_PROP_FPS)
        self.rate = rate if math.isfinite(rate) and rate > 0 else _FALLBACK_RATE
        self.num_frames = max(0, int(self._capture.get(self._cv2.CAP_PROP_FRAME_COUNT)))

    def __iter__(self) -> Iterator[np.ndarray]:
        """``(H, W, 3)`` uint8 each, in the order red, green, blue; can be run through once."""
        try:
            while True:
                readable, frame = self._capture.read()
                if not readable:
                    break
                self._num_read += 1
                yield np.ascontiguousarray(frame[:, :, ::-1])
        finally:
            self._capture.release()

    def require_complete(self) -> None:
        """To be called behind the last frame: OpenCV does not tell an end from damage.

        Raises:
            DataError: if there should be more frames, or there was none.
        """
        # Some containers only estimate the number of frames.
        tolerance = max(2, self.num_frames // 50)
        if self._num_read == 0 or self._num_read + tolerance < self.num_frames:
            raise DataError(
                f"video {self._path} ends after {self._num_read} of {self.num_frames} frames: it "
                "is damaged; replace the file."
            )


class VideoWriter:
    """Writes frames to an mp4 file, whose size is that of the first one."""

    def __init__(self, path: Path, rate: float) -> None:
        self._cv2 = require_opencv()
        self._path = path
        self._rate = rate
        self._writer: Any = None

    def add(self, rgb: np.ndarray) -> None:
        """Appends a frame, ``(H, W, 3)`` uint8 RGB.

        Raises:
            DataError: if OpenCV cannot write to the file.
        """
        if self._writer is None:
            codec = self._cv2.VideoWriter_fourcc(*"mp4v")
            size = (rgb.shape[1], rgb.shape[0])
            self._writer = self._cv2.VideoWriter(str(self._path), codec, self._rate, size)
            if not self._writer.isOpened():
                raise DataError(f"video {self._path} cannot be written: choose another --output.")
        self._writer.write(np.ascontiguousarray(rgb[:, :, ::-1]))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.release()
