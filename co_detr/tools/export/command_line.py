"""The command line of tools/export.py."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from co_detr.errors import ConfigError, ExportError
from co_detr.tools.export import BOX_TOLERANCE, MASK_TOLERANCE, SCORE_TOLERANCE, SUFFIXES
from co_detr.tools.predict.command_line import add_model_arguments

if TYPE_CHECKING:
    from co_detr.checkpoint.detector import Detector
    from co_detr.tools.export.graph import Description
    from co_detr.tools.export.predictor import Check

DESCRIPTION = """Writes a trained detector to an ONNX or torch.export file.

The auxiliary part is left out. See docs/export.md for what the file takes and gives."""

EPILOG = """
examples:
  any image size   python tools/export.py --config-file configs/co_detr_r50.py \\
                       --checkpoint output/co_detr_r50/model_final.pth --format onnx \\
                       --output co_detr_r50.onnx --check photos
  one input size   python tools/export.py --config-file output/mine/config.yaml \\
                       --checkpoint output/mine/model_final.pth --format onnx \\
                       --output mine.onnx --image-size 800x1344

exit status: 0; 2 after an error that is explained in one sentence, and if --check finds that the
file differs from the model.
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of tools/export.py."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add("--format", required=True, choices=sorted(SUFFIXES), help="of the file")
    add("--output", required=True, type=Path, metavar="FILE", help="ends in .onnx or .pt2")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--image-size",
        type=_image_size,
        metavar="HxW",
        help="one size in pixels of the network input; smaller images are padded to it",
    )
    size.add_argument(
        "--dynamic",
        action="store_true",
        help="any image size (the default, except for models that pad to squares)",
    )
    add(
        "--custom-operator",
        action="store_true",
        help="torch_export: keep this package's attention kernel; faster, but the file can only "
        "be loaded where co_detr is installed",
    )
    add("--boxes-only", action="store_true", help="leave out the masks of a model that has some")
    add(
        "--check",
        nargs="+",
        default=[],
        metavar="IMAGE",
        help=f"compare with PyTorch on these: within {SCORE_TOLERANCE} in scores, "
        f"{BOX_TOLERANCE} pixels in boxes and {MASK_TOLERANCE} in masks, or the exit status is 2",
    )
    return parser.parse_args(argv)


def _image_size(text: str) -> tuple[int, int]:
    try:
        height, width = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, as 800x1344") from None
    return height, width


def run(options: argparse.Namespace) -> None:
    """Exports, and checks where there are images for it.

    Raises:
        UserError: if something cannot be read or exported, or the file differs from the model.
    """
    from co_detr.checkpoint.detector import load_detector
    from co_detr.data.images import image_suffixes
    from co_detr.tools.export.exporting import ExportSettings, export_detector, square_side
    from co_detr.tools.predict.inputs import find_inputs

    images = find_inputs(options.check, image_suffixes(), options.output) if options.check else None
    if images is not None and images.problems:
        raise ConfigError(" ".join(images.problems))
    if images is not None and images.passed_over:
        print(images.remark())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    detector = load_detector(
        options.config_file,
        options.checkpoint,
        detector=options.detector,
        overrides=options.set,
        unsafe=options.unsafe,
    )
    side = square_side(detector.model)
    if options.dynamic and side:
        raise ConfigError(f"--dynamic: this model pads images to squares of {side} pixels.")
    settings = ExportSettings(
        options.format, options.image_size, options.custom_operator, not options.boxes_only
    )
    description = export_detector(
        detector, Path(options.config_file).name, options.output, settings
    )
    print(f"Wrote {options.output}, {_summary(description, options.output)}.")
    if images is not None:
        check(options.output, detector, images.files)


_HEADER = (
    f"{'image':24} {'input':>10} {'pairs':>6} {'at cut':>6} {'score':>9} {'box px':>9} {'mask':>9}"
    "  seconds"
)


def _summary(description: Description, path: Path) -> str:
    size = description.image_size
    sizes = "any image size" if size is None else f"images padded to {size[0]}x{size[1]}"
    what = "boxes and masks" if description.masks else "boxes"
    number = len(description.class_names)
    return f"{path.stat().st_size / 2**20:.1f} MiB, {number} classes, {what}, {sizes}"


def check(path: Path, detector: Detector, images: list[Path]) -> None:
    """Compares the file with the model on images and prints a table.

    Raises:
        ExportError: if they differ by more than the tolerances.
    """
    from co_detr.data.images import ImageReader
    from co_detr.tools.export.predictor import ExportedPredictor, check_image

    limit = ImageReader.of_data(detector.cfg.data).max_pixels
    predictor = ExportedPredictor(path, max_image_pixels=limit)
    image_format = detector.cfg.dataloader.test.mapper.image_format
    print(_HEADER)
    different = []
    for image in images:
        result = check_image(predictor, detector.model, image_format, image)
        print(_row(image, result), flush=True)
        if not result.difference.is_small:
            different.append(image.name)
    if different:
        raise ExportError(
            f"{path} differs from the model by more than {SCORE_TOLERANCE} in scores, "
            f"{BOX_TOLERANCE} pixels in boxes or {MASK_TOLERANCE} in masks on {len(different)} of "
            f"{len(images)} images (first: {different[0]}): compare the rows above."
        )
    print(f"The file agrees with the model on {len(images)} images.")


def _row(image: Path, check: Check) -> str:
    found = check.difference
    size = f"{check.input_size[0]}x{check.input_size[1]}"
    lost = f", {found.lost} WITHOUT PARTNER" if found.lost else ""
    return (
        f"{image.name[:24]:24} {size:>10} {found.compared:>6} {found.at_cut:>6} "
        f"{found.score:>9.1e} {found.box:>9.1e} {found.mask:>9.1e}  "
        f"{check.file_seconds:.2f} (PyTorch {check.model_seconds:.2f}){lost}"
    )
