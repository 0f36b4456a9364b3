"""The command line of predict.py, which answers `--help` without loading torch."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from co_detr.errors import ConfigError, add_debug_argument

EPILOG = """
examples:
  a folder         python predict.py --config-file configs/co_detr_r50.py \\
                       --checkpoint output/co_detr_r50/model_final.pth photos --output drawn
  files, patterns  python predict.py --config-file co_detr_r50 --checkpoint a.pth 'photos/*.jpg' \\
                       other.png --output drawn --score 0.5 --batch-size 8
  a video          python predict.py --config-file co_detr_r50 --checkpoint a.pth clip.mp4 \\
                       --output drawn --video
  large images     python predict.py --config-file co_detr_r50 --checkpoint a.pth photos \\
                       --output drawn --tiles 640 --overlap 0.2 --batch-size 8

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
    add("inputs", nargs="+", metavar="INPUT", help="file, folder (with subfolders) or pattern")
    add("--output", required=True, metavar="DIR", help="folder for pictures and predictions.json")
    add("--score", type=float, default=0.3, help="lowest score to keep (default: 0.3)")
    add_mask_argument(parser)
    add("--batch-size", type=int, default=1, help="images of equal size at once (default: 1)")
    add("--video", action="store_true", help="the inputs are videos (needs OpenCV)")
    add("--tta", choices=["flip", "multiscale"], help="test-time augmentation: 2 or 6 views each")
    add("--tiles", type=int, metavar="N", help="cut images into tiles of N pixels, and see each")
    add("--overlap", type=float, metavar="P", help="of tiles, a share of N (default: 0.2)")
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


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds which images are read."""
    parser.add_argument(
        "--max-image-pixels",
        type=int,
        metavar="N",
        help="refuse image files with more pixels (default: data.max_image_pixels of the config)",
    )


def run(options: argparse.Namespace) -> int:
    """Does what the arguments ask for.

    Returns:
        The exit status: 0, or 1 if inputs could not be read.

    Raises:
        UserError: if an argument is wrong or there is nothing to read.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("co_detr").setLevel(logging.INFO)  # says which weights are used
    from co_detr.data.images import image_suffixes
    from co_detr.engine.views import Tiles
    from co_detr.tools.predict import files
    from co_detr.tools.predict.predictor import Predictor

    if options.overlap is not None and options.tiles is None:
        raise ConfigError("--overlap is of tiles: add --tiles N, their side in pixels.")
    if options.video:
        files.require_opencv()
    # First what fails fast, then the model.
    folder = Path(options.output)
    suffixes = files.VIDEOS if options.video else image_suffixes()
    inputs = files.find_inputs(options.inputs, suffixes, folder)
    if not options.video and all(path.suffix.lower() in files.VIDEOS for path in inputs.files):
        raise ConfigError(f"{inputs.files[0]} is a video: add --video.")
    if inputs.passed_over:
        print(inputs.remark(), file=sys.stderr)
    tiles = options.tiles
    if options.overlap is not None:
        tiles = Tiles(options.tiles, options.overlap)
    predictor = Predictor(
        options.config_file,
        options.checkpoint,
        detector=options.detector,
        device=options.device,
        score_threshold=options.score,
        batch_size=options.batch_size,
        overrides=options.set,
        unsafe=options.unsafe,
        max_image_pixels=options.max_image_pixels,
        mask_threshold=options.mask_threshold,
        amp=options.amp,
        tta=options.tta,
        tiles=tiles,
    )
    output = files.OutputFolder(folder, predictor.class_names)
    predict = files.predict_videos if options.video else files.predict_images
    try:
        unreadable = inputs.problems + predict(predictor, inputs.files, output)
    finally:
        json_file = output.save()  # also what was done before an interruption
    images = "frames" if options.video else "images"
    print(f"Detections of {len(output.results)} {images} are in {json_file}, pictures beside it.")
    if unreadable:
        print(f"{len(unreadable)} could not be read:", *unreadable, sep="\n  ", file=sys.stderr)
    return int(bool(unreadable))
