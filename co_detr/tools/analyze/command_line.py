"""The command line of tools/analyze.py, and the measures by name."""

from __future__ import annotations

import argparse
import functools
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, TypeAlias

from tqdm import tqdm

import co_detr
from co_detr.errors import ConfigError, add_debug_argument
from co_detr.tools.predict.command_line import add_device_argument

if TYPE_CHECKING:
    import torch

    from co_detr.tools.analyze.report import RenderedSection, Section, Table
    from co_detr.tools.analyze.subjects import (
        MappedSamples,
        ModelArgument,
        Models,
        Progress,
        Sample,
        Subject,
    )

DESCRIPTION = """Measures what trained models do, and writes a report as one HTML file.

Beside it lie the numbers (JSON, CSV) and the charts (PNG, SVG). docs/analysis.md says what each
measure means. For parameters and FLOPs see tools/analyze_model.py."""

EPILOG = """
examples:
  two runs           python tools/analyze.py --model "K = 0=output/k0" --model "K = 2=output/k2" \\
                         --output-dir output/analysis
  other images       python tools/analyze.py --model output/k2 --data-json cells/val.json \\
                         --data-images cells/images --images 20 --output-dir output/analysis
  config, weights    python tools/analyze.py --model mine=co_detr_r50,model.pth \\
                         --only errors --output-dir output/analysis

exit status: 0; 2 after an error that is explained in one sentence.
"""

Measure: TypeAlias = "Callable[[Sequence[Subject], Sequence[Sample], Progress], Section]"
_HERE = "co_detr.tools.analyze"
MEASURES = {  # name -> function, in the order of the report
    "discriminability": f"{_HERE}.discriminability:measure_discriminability",
    "attention": f"{_HERE}.attention:measure_attention",
    "conflict": f"{_HERE}.conflict:measure_conflict",
    "positives": f"{_HERE}.positives:measure_positives",
    "instability": f"{_HERE}.matching:measure_instability",
    "errors": f"{_HERE}.detection_errors:measure_errors",
}


def choose_measures(names: Sequence[str] | None) -> dict[str, Measure]:
    """Those named, in the order of the report; all for None.

    Raises:
        ConfigError: if there is no measure of a name.
    """
    unknown = [name for name in names or () if name not in MEASURES]
    if unknown:
        raise ConfigError(f"there is no measure {unknown[0]}: choose {', '.join(MEASURES)}.")
    chosen = [name for name in MEASURES if names is None or name in names]
    return {name: resolve_name(MEASURES[name]) for name in chosen}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of tools/analyze.py."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        action="append",
        required=True,
        metavar="NAME=MODEL",
        help="a run's output folder or one of its checkpoints, CONFIG,WEIGHTS, or a model of the "
        "zoo; NAME= can be left out; can be repeated",
    )
    add("--output-dir", required=True, type=Path, metavar="DIR", help="for the report")
    add("--data-json", metavar="FILE", help="COCO format; default: the first model's data.val")
    add("--data-images", metavar="DIR", help="folder of the images of --data-json")
    add(
        "--images",
        type=int,
        default=72,
        metavar="N",
        help="evenly spread over the set (default: 72)",
    )
    add(
        "--only",
        nargs="+",
        metavar="MEASURE",
        help=f"some of: {', '.join(MEASURES)} (default: all)",
    )
    add("--seed", type=int, default=0, help="of what is drawn at random (default: 0)")
    add_device_argument(parser)
    add("--unsafe", action="store_true", help="let checkpoints run code; only if you trust them")
    add_debug_argument(parser)
    options = parser.parse_args(argv)
    options.command = shlex.join(
        ["python", "tools/analyze.py", *(sys.argv[1:] if argv is None else argv)]
    )
    return options


def run(options: argparse.Namespace) -> None:
    """Measures, and writes each section as soon as it is there, the report at the end.

    Raises:
        UserError: if an argument is wrong, or something cannot be read or written.
    """
    from co_detr.tools.analyze.report import Frame, report_page, write_file, write_json
    from co_detr.tools.analyze.subjects import load_models, load_samples, parse_model
    from co_detr.tools.predict.predictor import choose_device

    measures = choose_measures(options.only)
    arguments = [parse_model(text) for text in options.model]
    device = choose_device(options.device)
    models = load_models(arguments, device, options.unsafe)
    samples = load_samples(
        models.subjects[0].cfg,
        models.class_names,
        options.images,
        options.data_json,
        options.data_images,
    )
    folder: Path = options.output_dir
    sections = [
        _measured(key, measure, models, samples, options.seed, folder)
        for key, measure in measures.items()
    ]
    environment = _environment(device, options.seed)
    write_json(
        folder / "results.json",
        {
            "command": options.command,
            "environment": environment,
            "classes": models.class_names,
            "images": [record["file_name"] for record in samples.records],
            "measures": {result.section.key: result.section.numbers for result in sections},
        },
    )
    frame = Frame(
        title=f"Analysis of {', '.join(subject.name for subject in models.subjects)}",
        models=_model_table(arguments, models),
        images=_images_sentence(options, models, samples),
        environment=environment,
        commands=(options.command,),
    )
    report = folder / "report.html"
    write_file(report, report_page(frame, sections))
    print(f"Wrote {report}; the numbers and charts are beside it.")


def _measured(
    key: str, measure: Measure, models: Models, samples: MappedSamples, seed: int, folder: Path
) -> RenderedSection:
    from co_detr.seeding import seed_everything
    from co_detr.tools.analyze.report import render, write_section

    seed_everything("analysis", seed, key)  # whatever was measured before
    progress = functools.partial(tqdm, desc=key, unit="image", leave=False, disable=None)
    rendered = render(measure(models.subjects, samples, progress))
    write_section(rendered, folder)
    print(f"{key}: done.", flush=True)
    return rendered


def _model_table(arguments: Sequence[ModelArgument], models: Models) -> Table:
    from co_detr.tools.analyze.report import Table

    rows = []
    for argument, subject in zip(arguments, models.subjects, strict=True):
        auxiliary = subject.model.auxiliary
        heads = [] if auxiliary is None else list(auxiliary.heads)
        parameters = sum(parameter.numel() for parameter in subject.model.parameters())
        rows.append(
            (
                subject.name,
                argument.weights or f"released for {argument.config}",
                len(heads),
                ", ".join(heads) or "none",
                parameters / 1e6,
                len(argument.checkpoints),
            )
        )
    return Table(
        "models",
        f"All are for {len(models.class_names)} classes: {', '.join(models.class_names[:20])}"
        f"{' and more' if len(models.class_names) > 20 else ''}.",
        ("model", "weights", "K", "auxiliary heads", "parameters (M)", "checkpoints"),
        tuple(rows),
    )


def _images_sentence(options: argparse.Namespace, models: Models, samples: MappedSamples) -> str:
    source = options.data_json or models.subjects[0].cfg.data.val
    objects = sum(
        not annotation["iscrowd"]
        for record in samples.records
        for annotation in record["annotations"]
    )
    return (
        f"Measured on {len(samples)} images of {source} with {objects} objects, resized as in the "
        "evaluation."
    )


def _environment(device: torch.device, seed: int) -> dict[str, str]:
    import torch

    from co_detr.layers.deformable_attention import HAS_EXTENSION

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "co_detr": co_detr.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": platform.platform(),
        "device": f"{device} ({name})",
        "threads": str(torch.get_num_threads()),
        "attention kernel": "compiled" if HAS_EXTENSION else "PyTorch reference",
        "seed": str(seed),
    }
