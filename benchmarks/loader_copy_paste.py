"""Images a second that one core loads for training, with stronger augmentation and without.

    python -m benchmarks.loader_copy_paste [--size 1024] [--rounds 5] [--output F.json]

Large-scale jitter and DETR's augmentation on made-up data of COCO's kind: photographs of 640x480 as
JPEG with as many objects as COCO has on average, with polygons. Contestants take turns, each
loading the same positions of its stream; times are those of the processor, so that other programs
do not count.

* boxes: as without copy-paste: no mask is read.
* masks: masks are read and augmented, for a mask head.
* copy-paste: masks are read, objects pasted, and masks dropped: for a model of boxes.
* copy-paste, masks kept: the same for a mask head.
* DETR: resized and cropped as in most configs, boxes only.
* colors: the same with all changes of `ColorJitter`.
* mosaic in a quarter, half, all, colors: with four images in one in so many of the samples.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import environment, markdown_table, write_json
from co_detr.data.augmentation import Variation, detr_train_augmentation, lsj_train_augmentation
from co_detr.data.coco import load_coco
from co_detr.data.copy_paste import CopyPaste
from co_detr.data.loader import CheckedDatasetMapper, build_train_loader
from co_detr.data.mixing import Mixing

OBJECTS = 7.3  # of an image, on average as in COCO
POINTS = 30  # of a polygon
WIDTH, HEIGHT = 640, 480
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "motorcycle_left", "cat")
# What a model gets that is trained without copy-paste.
BASELINES = {
    "copy-paste": "boxes",
    "copy-paste, masks kept": "masks",
    "colors": "DETR",
    "mosaic in a quarter, colors": "DETR",
    "mosaic in half, colors": "DETR",
    "mosaic in all, colors": "DETR",
}
COLORS = Variation(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)


def write_data(folder: Path, images: int, seed: int = 0) -> Path:
    """A data set in COCO's format; returns its annotation file."""
    rng = np.random.default_rng(seed)
    data = Path(find_spec("skimage").origin).parent / "data"
    files = [path for path in sorted(data.iterdir()) if path.stem in PHOTOGRAPHS]
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    for index in range(images):
        photograph = Image.open(files[index % len(files)]).convert("RGB").resize((WIDTH, HEIGHT))
        photograph.save(folder / f"{index}.jpg", quality=90)
        image = {"id": index, "file_name": f"{index}.jpg", "width": WIDTH, "height": HEIGHT}
        content["images"].append(image)
        for _ in range(rng.integers(round(2 * OBJECTS) + 1)):
            center = rng.uniform((0, 0), (WIDTH, HEIGHT))
            # Sides of objects in COCO: many small ones, some as large as the image.
            radius = min(np.exp(rng.normal(3.6, 0.9)), 220.0)
            angles = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
            reach = radius * rng.uniform(0.7, 1.3, POINTS)
            points = center + np.stack([np.cos(angles), np.sin(angles)], axis=1) * reach[:, None]
            points = points.clip(0, (WIDTH, HEIGHT)).round(2)
            low, high = points.min(axis=0), points.max(axis=0)
            if (high - low).min() < 2:
                continue
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": index,
                    "category_id": 1,
                    "bbox": [*low.tolist(), *(high - low).tolist()],
                    "segmentation": [points.reshape(-1).tolist()],
                }
            )
    (folder / "train.json").write_text(json.dumps(content))
    return folder / "train.json"


def mosaic(share: float) -> Mixing:
    """Mosaic that never ends."""
    return Mixing(mosaic=share, until=1.0, max_iter=1_000_000)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=1024, help="side of the square in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=40, help="loaded in a round")
    parser.add_argument("--only", choices=("boxes", "masks", "DETR"), help="with its contestants")
    parser.add_argument("--output", help="json file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = str(write_data(Path(folder), 36))
        streams = {}
        lsj, detr = lsj_train_augmentation(options.size), detr_train_augmentation()
        varied = [*detr, *COLORS.behind()]
        for name, steps, with_masks, more in (
            ("boxes", lsj, False, {}),
            ("masks", lsj, True, {}),
            ("copy-paste", lsj, True, {"copy_paste": CopyPaste(keep_masks=False)}),
            ("copy-paste, masks kept", lsj, True, {"copy_paste": CopyPaste(keep_masks=True)}),
            ("DETR", detr, False, {}),
            ("colors", varied, False, {}),
            ("mosaic in a quarter, colors", varied, False, {"mixing": mosaic(0.25)}),
            ("mosaic in half, colors", varied, False, {"mixing": mosaic(0.5)}),
            ("mosaic in all, colors", varied, False, {"mixing": mosaic(1.0)}),
        ):
            if options.only not in (None, name, BASELINES.get(name)):
                continue
            loader = build_train_loader(
                load_coco(file, folder, with_masks=with_masks),
                mapper=CheckedDatasetMapper(True, steps, "RGB", recompute_boxes=with_masks),
                total_batch_size=options.images,
                seed=0,
                aspect_ratio_grouping=False,
                **more,
            )
            streams[name] = iter(loader)
        for stream in streams.values():
            next(stream)  # not timed
        seconds: dict[str, list[float]] = {name: [] for name in streams}
        for _ in range(options.rounds):
            for name, stream in streams.items():
                start = time.process_time()
                next(stream)
                seconds[name].append((time.process_time() - start) / options.images)
    rows, results = [], {}
    for name, values in seconds.items():
        median = statistics.median(values)
        results[name] = {"seconds": values}
        ratio = ""
        if name in BASELINES:
            pairs = zip(seconds[BASELINES[name]], values, strict=True)
            results[name]["throughput"] = statistics.median(base / own for base, own in pairs)
            ratio = f"{results[name]['throughput']:.2f} of {BASELINES[name]}"
        rows.append((name, f"{1e3 * median:.1f}", f"{1 / median:.1f}", ratio))
    headers = ("contestant", "ms per image", "images per second and core", "throughput")
    print(markdown_table(headers, rows))
    found = environment()
    print(f"{found['cpu']}, torch {found['torch']}, load {found['load_average'][0]:.1f}")
    if options.output:
        settings = {"size": options.size, "images": options.images, "rounds": options.rounds}
        write_json(options.output, {"environment": found, **settings, "results": results})


if __name__ == "__main__":
    main()
