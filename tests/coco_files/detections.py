"""A ground truth, detections of it by made-up models, and both as files."""

import json
from pathlib import Path

from benchmarks.evaluation import made_up_detections, made_up_truth


def write_truth(folder: Path, images: int = 12, classes: int = 3) -> tuple[dict, Path]:
    """The content, and the file."""
    truth = made_up_truth(images, classes)
    path = folder / "truth.json"
    path.write_text(json.dumps(truth))
    return truth, path


def found_by(truth: dict, seed: int, per_image: int = 20) -> list[dict]:
    """Detections as a model writes them, in single precision: every image has some."""
    return made_up_detections(truth, per_image, seed)


def write(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def apart(image: int, scores: list[float], category: int = 1) -> list[dict]:
    """Detections of one class that do not touch each other."""
    return [
        {"image_id": image, "category_id": category, "score": score}
        | {"bbox": [60.0 * n, 10.5 * n, 40.25, 30.5]}
        for n, score in enumerate(scores)
    ]
