"""Preflight of image files: all looked up, and some or all decoded as in training."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from detectron2.data.detection_utils import read_image
from PIL import Image
from tqdm import tqdm

from co_detr.data.image_files import locate_files
from co_detr.data.preflight_report import SplitReport


@dataclass(frozen=True)
class _Decoded:
    """An image with what is wrong with it; "" stands for nothing."""

    path: str
    broken: str = ""
    other_size: str = ""


def check_images(
    report: SplitReport, images: list[dict[str, Any]], image_root: str, count: int | None
) -> list[dict[str, Any]]:
    """Looks every file up, and decodes `count` of those there are (None: all, with a bar).

    Args:
        images: entries of `images` with a `file_name` of text and a `width` and `height`.

    Returns:
        Those whose file is there; their `file_name` is where it is, relative to `image_root`.
    """
    key = f"data.{report.split}_images"
    if not os.path.isdir(image_root):
        report.add(
            "error",
            [image_root],
            "image directory that does not exist",
            f"set {key} to the directory of the images",
        )
        return []
    located = locate_files((image["file_name"] for image in images), image_root)
    report.add(
        "warning",
        [
            f"{name!r}, found at {os.path.join(image_root, located.paths[name])}"
            for name in located.moved
        ],
        "image files that are not where the json says",
        "read from where they were found",
    )
    hint = located.hint()
    report.add(
        "error",
        [os.path.join(image_root, name) for name in located.missing],
        "image files that do not exist",
        f"add the files, remove their entries, or set {key} to the right directory"
        f"{f' ({hint})' * bool(hint)}",
    )
    found = [
        image | {"file_name": located.paths[image["file_name"]]}
        for image in images
        if image["file_name"] in located.paths
    ]
    if count is None or count >= len(found):
        chosen = found
    else:
        # Always the same ones: the outcome of a run must not depend on luck.
        chosen = random.Random(0).sample(found, count)
    report.decoded = len(chosen)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(lambda image: _decode(image, image_root), chosen)
        bar = tqdm(
            results,
            f"decoding {report.split} images",
            len(chosen),
            disable=count is not None,
            leave=False,
        )
        decoded = list(bar)
    report.add(
        "error",
        [f"{each.path}, {each.broken}" for each in decoded if each.broken],
        "image files that cannot be decoded",
        "replace the files, or remove their entries",
    )
    report.add(
        "error",
        [f"{each.path} is {each.other_size}" for each in decoded if each.other_size],
        "image files of another size than the json says",
        "write the true sizes (width x height), or remove a rotation from the EXIF data",
    )
    return found


def _decode(image: dict[str, Any], image_root: str) -> _Decoded:
    path = os.path.join(image_root, image["file_name"])
    try:
        height, width = read_image(path, "RGB").shape[:2]
    # Pillow reports broken files as OSError, SyntaxError (PNG chunks) or ValueError (headers).
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return _Decoded(path, broken=" ".join(str(error).split()) or type(error).__name__)
    if (width, height) != (image["width"], image["height"]):
        annotated = f"{image['width']}x{image['height']}"
        return _Decoded(path, other_size=f"{width}x{height}, not {annotated}")
    return _Decoded(path)
