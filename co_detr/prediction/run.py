"""Runs a predictor over files; those that cannot be read do not stop the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from co_detr.errors import DataError
from co_detr.prediction.output import OutputFolder
from co_detr.prediction.predictor import Predictor, Sample
from co_detr.prediction.video import VideoReader, VideoWriter


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
