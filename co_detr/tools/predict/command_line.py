"""The command line of predict.py, which answers `--help` without loading torch."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from co_detr.errors import ConfigError, LostProcessError, UserError, add_debug_argument

if TYPE_CHECKING:
    from co_detr.tools.predict.inputs import Inputs
    from co_detr.tools.predict.predictor import Predictor

EPILOG = """
examples:
  a folder         python predict.py --config-file configs/co_detr_r50.py \\
                       --checkpoint output/co_detr_r50/model_final.pth photos --output drawn
  files, patterns  python predict.py --config-file co_detr_r50 --checkpoint a.pth 'photos/*.jpg' \\
                       other.png --output drawn --score 0.5 --batch-size 8
  a COCO json      python predict.py --config-file co_detr_r50 --checkpoint a.pth test.json \\
                       --images photos --output found --no-pictures --num-gpus 4
  a video          python predict.py --config-file co_detr_r50 --checkpoint a.pth clip.mp4 \\
                       --output drawn --video
  large images     python predict.py --config-file co_detr_r50 --checkpoint a.pth photos \\
                       --output drawn --tiles 640 --overlap 0.2 --batch-size 8

What was killed goes on with the same command. Processes can also be started by torchrun.

exit status: 0; 1 if inputs could not be read (they are listed at the end, the others are done);
2 after an error that is explained in one sentence.
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of predict.py; options may stand before, between or behind the inputs."""
    parser = argparse.ArgumentParser(
        description="Detects objects in images or videos; writes drawn pictures and one json, with "
        "masks where the model predicts them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    add_device_argument(parser)
    add_amp_argument(parser)
    add_image_arguments(parser)
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="file, folder (with subfolders), pattern, list of paths (.txt) or COCO format (.json)",
    )
    add("--images", metavar="DIR", help="folder of a json's images (default: that of the json)")
    add("--output", required=True, metavar="DIR", help="folder for pictures and predictions.json")
    add("--no-pictures", action="store_true", help="write predictions.json alone")
    add(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="processes that share the images, each with a GPU of its own if there are some",
    )
    add("--score", type=float, default=0.3, help="lowest score to keep (default: 0.3)")
    add_mask_argument(parser)
    add("--video", action="store_true", help="the inputs are videos (needs OpenCV)")
    add_view_arguments(parser)
    return parser.parse_intermixed_args(argv)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what says which model it is, and `--debug`."""
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="config file, or name in the zoo")
    add("--checkpoint", metavar="FILE", help="weights; default: those released for the model")
    add(
        "--detector",
        metavar="NAME",
        help="which one of the model: decoder, roi, atss, ..., merged, cascade (default: decoder)",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override of a config key; can be repeated",
    )
    add("--unsafe", action="store_true", help="let the checkpoint run code; only if you trust it")
    add_debug_argument(parser)


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Adds where the model runs."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")


def add_amp_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the precision of the model."""
    parser.add_argument(
        "--amp",
        choices=["bfloat16", "float16"],
        help="mixed precision: faster on a GPU, detections change a little (default: float32)",
    )


def add_mask_argument(parser: argparse.ArgumentParser) -> None:
    """Adds what makes a mask of probabilities."""
    parser.add_argument(
        "--mask-threshold",
        type=float,
        default=0.5,
        metavar="P",
        help="probability from which on a pixel is of an object, for models with masks "
        "(default: 0.5)",
    )


def add_view_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds how often an image is looked at, and how much of it at once."""
    add = parser.add_argument
    add("--batch-size", type=int, default=1, help="images of equal size at once (default: 1)")
    add("--tta", choices=["flip", "multiscale"], help="test-time augmentation: 2 or 6 views each")
    add("--tiles", type=int, metavar="N", help="cut images into tiles of N pixels, and see each")
    add("--overlap", type=float, metavar="P", help="of tiles, a share of N (default: 0.2)")


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds which images are read."""
    parser.add_argument(
        "--max-image-pixels",
        type=int,
        metavar="N",
        help="refuse image files with more pixels (default: data.max_image_pixels of the config)",
    )


def run(options: argparse.Namespace) -> int:
    """Does what the arguments ask for, in one process or several.

    Returns:
        The exit status: 0, 1 if inputs could not be read, or that of a process that failed.

    Raises:
        UserError: if an argument is wrong or there is nothing to read; of several processes, if one
            was ended from without.
    """
    from co_detr.engine.launch import Job, launch_job, under_torchrun

    if options.num_gpus < 1:
        raise ConfigError(f"--num-gpus {options.num_gpus} must be at least 1.")
    check_view_arguments(options)
    if options.num_gpus == 1 and not under_torchrun():
        return predict(options)
    if options.video:
        raise ConfigError("--video runs in one process: leave --num-gpus and torchrun out.")
    import torch

    return launch_job(
        Job(
            main=partial(predict, options),
            program="predict.py",
            device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
            device_option="--device ",
            # One may have much larger images than another.
            patience=timedelta(days=1),
            debug=options.debug,
            goes_on="start it again, which goes on with the images that are not done",
            interrupted="the same command goes on with the images that are not done",
            kept="predictions",
            num_gpus=options.num_gpus,
        )
    )


def predict(options: argparse.Namespace) -> int:
    """What each process does; returns the exit status."""
    logging.basicConfig(format="%(message)s")
    from detectron2.utils import comm

    from co_detr.engine.launch import jointly, raise_jointly, under_torchrun
    from co_detr.tools.predict import files
    from co_detr.tools.predict.results import Classes

    is_main = comm.is_main_process()
    # The first process says which weights are used.
    logging.getLogger("co_detr").setLevel(logging.INFO if is_main else logging.WARNING)
    if under_torchrun():
        signal.signal(signal.SIGTERM, _say_how_to_go_on)
    if options.video:
        files.require_opencv()
    # First what fails fast, then the model.
    inputs = jointly(partial(_find, options))
    if inputs.passed_over and is_main:
        print(inputs.remark(), file=sys.stderr)
    problem = None
    try:
        predictor = predictor_of(options, options.score)
    except UserError as error:
        problem = error
    raise_jointly(problem)
    classes = Classes.like(predictor.class_names, inputs.categories)
    if inputs.categories and not classes.from_file and is_main:
        print(
            f"{options.inputs[0]} does not have all classes of the checkpoint as categories: "
            "predictions.json numbers them from 1.",
            file=sys.stderr,
        )
    output = files.OutputFolder(
        Path(options.output), classes, not options.no_pictures, comm.get_rank()
    )
    results = output.results
    done = jointly(lambda: results.begin(_plan(options, inputs), goes_on=not options.video))
    if done and is_main:
        print(f"Going on: {len(done)} of {len(inputs.images)} images are done.", file=sys.stderr)
    try:
        if options.video:
            files.predict_videos(predictor, inputs.files, output)
        else:
            left = [number for number in range(len(inputs.images)) if number not in done]
            files.predict_images(
                predictor, inputs.images, left[comm.get_rank() :: comm.get_world_size()], output
            )
        comm.all_gather(None)  # until all have done their part
    except BaseException:
        if comm.get_world_size() == 1:
            results.write()  # what was done before an interruption
            if options.video:
                results.remove()
        raise
    num_images, unreadable = jointly(results.write)
    unreadable = inputs.problems + unreadable
    results.close()
    comm.all_gather(None)
    if is_main:
        results.remove()
        what = "frames" if options.video else "images"
        beside = "" if options.no_pictures else ", pictures beside it"
        print(f"Detections of {num_images} {what} are in {results.path}{beside}.")
        if unreadable:
            print(f"{len(unreadable)} could not be read:", *unreadable, sep="\n  ", file=sys.stderr)
    comm.all_gather(None)  # a process that ends with 1 lets a launcher end the others
    return int(bool(unreadable))


def check_view_arguments(options: argparse.Namespace) -> None:
    """Raises a ConfigError if one is given without the other that it belongs to."""
    if options.overlap is not None and options.tiles is None:
        raise ConfigError("--overlap is of tiles: add --tiles N, their side in pixels.")


def predictor_of(options: argparse.Namespace, score_threshold: float) -> Predictor:
    """The predictor that the arguments of the `add_*_arguments` describe.

    Raises:
        UserError: as `Predictor`.
    """
    from co_detr.engine.views import Tiles
    from co_detr.tools.predict.predictor import Predictor

    tiles = options.tiles
    if options.overlap is not None:
        tiles = Tiles(options.tiles, options.overlap)
    return Predictor(
        options.config_file,
        options.checkpoint,
        detector=options.detector,
        device=options.device,
        score_threshold=score_threshold,
        batch_size=options.batch_size,
        overrides=options.set,
        unsafe=options.unsafe,
        max_image_pixels=options.max_image_pixels,
        mask_threshold=options.mask_threshold,
        amp=options.amp,
        tta=options.tta,
        tiles=tiles,
    )


def _find(options: argparse.Namespace) -> Inputs:
    from co_detr.data.images import image_suffixes
    from co_detr.tools.predict import files
    from co_detr.tools.predict.inputs import find_images, find_inputs

    folder = Path(options.output)
    if options.video:
        return find_inputs(options.inputs, files.VIDEOS, folder)
    found = find_images(options.inputs, image_suffixes(), folder, options.images)
    if all(image.path.lower().endswith(tuple(files.VIDEOS)) for image in found.images):
        raise ConfigError(f"{found.images[0].path} is a video: add --video.")
    return found


def _plan(options: argparse.Namespace, inputs: Inputs) -> dict[str, Any]:
    """What the results depend on; other options may change when a prediction goes on."""
    free = {"inputs", "output", "device", "batch_size", "num_gpus", "unsafe", "debug"}
    plan = {key: value for key, value in vars(options).items() if key not in free}
    for key in ("config_file", "checkpoint"):
        if plan[key] is not None and os.path.isfile(plan[key]):
            status = os.stat(plan[key])
            plan[key] = [os.path.abspath(plan[key]), status.st_size, status.st_mtime_ns]
    return plan | {"inputs": inputs.digest()}


def _say_how_to_go_on(number: int, frame: FrameType | None) -> None:
    raise LostProcessError(
        "this process was told to stop (SIGTERM), as happens when another one has ended: see what "
        "that one said, and start it again, which goes on with the images that are not done."
    )
