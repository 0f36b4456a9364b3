"""A model card of a run: what the weights are, and how to use them, for whoever gets them.

    co-detr card output/mine --license apache-2.0

The head is what the Hugging Face hub reads of a model card (huggingface.co/docs/hub/model-cards),
so that the folder with the card, ``config.yaml`` and a checkpoint can be uploaded as it is. All
numbers are read from the files of the run; what is not there is said to be not recorded. Folders of
this machine are not named: only the names of files, and of the folder of a data set.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import co_detr
from co_detr.errors import ConfigError, WriteError, add_debug_argument
from co_detr.files import written_whole

if TYPE_CHECKING:
    from co_detr.tools.recorded_run import RecordedRun

EPILOG = """
examples:
  the best weights of a run     co-detr card output/mine --license cc-by-4.0
  others, and another place     co-detr card output/mine/model_final.pth --output card.md

exit status: 0, or 2 after an error that is explained in one sentence.
"""
UNKNOWN = "not recorded"
FEW_OBJECTS = 20  # of a class, below which the card names it
FEW_IMAGES = 1000
_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
_MOST_CLASSES = 100  # that have a row of their own
# Of what is not the name of a part of the model.
_EXPLAINED = {
    "merged": "`merged` joins the detections of decoder and heads by NMS",
    "cascade": "`cascade` decodes the detections of a head once more",
    "top_k": "`top_k` is the decoder without soft-NMS",
}
# "roi/segm/AP50" -> roi, segm, AP50; the name of a class may have anything in it.
_METRIC = re.compile(r"(?:(?!segm/)(\w+)/)?(?:(segm)/)?(AP.*)", re.DOTALL)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of ``co-detr card``."""
    parser = argparse.ArgumentParser(
        description="Writes a model card in Markdown, as the Hugging Face hub reads it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="output folder of a training, or a checkpoint in it")
    add("--output", type=Path, metavar="FILE", help="default: README.md in that folder")
    add("--license", metavar="NAME", help="of the weights, as the hub spells it: apache-2.0, mit")
    add("--name", help="of the model (default: name of the folder)")
    add("--force", action="store_true", help="replace a file that is there")
    add_debug_argument(parser)
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    """Writes the card, and says what to look at before it is published.

    Raises:
        ConfigError: if there is no run, or the card would replace a file.
        CheckpointError: if there are no weights, or a file of the run is damaged.
        DataError: if an annotation file is damaged.
        WriteError: if the card cannot be written.
    """
    from co_detr.tools.recorded_run import read_run

    is_file = options.run.is_file()
    folder = options.run.parent if is_file else options.run
    output: Path = options.output or folder / "README.md"
    if output.exists() and not options.force:
        raise ConfigError(f"{output} exists: choose another --output, or add --force.")
    recorded = read_run(folder, options.run if is_file else None)
    name = options.name or folder.resolve().name
    text = model_card(recorded, name, options.license)
    try:
        with written_whole(str(output)) as file:
            file.write(text)
    except OSError as error:
        raise WriteError(f"{output} cannot be written ({error.strerror}): name another.") from error
    print(f"Wrote {output}, of {recorded.weights.path}.")
    print(
        "config.yaml belongs to it, and has the paths of your data: look at it before you upload."
    )
    data = recorded.cfg.data
    for file, described in ((data.train, recorded.train), (data.val, recorded.val)):
        if described is None:
            print(f"{file} is not there: the card describes it if you start this where it is.")
    if options.license is None:
        print("No license is stated: --license NAME does it.")


def model_card(run: RecordedRun, name: str, license_name: str | None = None) -> str:
    """The whole card: head and sections.

    Args:
        name: of the model.
        license_name: of the weights; None: it is said to be unknown.
    """
    import yaml

    head = yaml.safe_dump(
        _head(run, name, license_name), sort_keys=False, allow_unicode=True, width=100
    )
    sections = [
        f"# {name}",
        _what_it_is(run),
        f"## How to use it\n\n{_usage(run)}",
        f"## Training data\n\n{_training_data(run)}",
        f"## Training procedure\n\n{_procedure(run)}",
        f"## Results\n\n{_results(run)}",
        f"## Limits\n\n{_limits(run)}",
        f"## License\n\n{_license(run, license_name)}",
        f"## Software\n\n{_software(run)}",
    ]
    return f"---\n{head}---\n\n" + "\n\n".join(sections) + "\n"


def _head(run: RecordedRun, name: str, license_name: str | None) -> dict[str, Any]:
    head: dict[str, Any] = {
        "license": license_name or "unknown",
        "library_name": "co_detr",
        "pipeline_tag": "object-detection",
        "tags": ["object-detection", "co-detr", "detectron2"],
        "datasets": [run.dataset],
    }
    if run.has_masks:
        head["tags"].append("instance-segmentation")
    if hub := re.match(r"hf://([^/@]+/[^/@]+)", run.setting("train.init_checkpoint", "") or ""):
        head["base_model"] = hub[1]
    metrics = [
        {"type": f"{'mask' if masks else 'box'} {metric}", "value": value}
        | ({"name": f"{metric} of {kind}"} if kind else {})
        for (kind, masks, metric), value in _named(run.metrics)
        if metric == "AP" or (metric in _COLUMNS and not kind)
    ]
    if metrics:
        # Without a result the hub refuses the entry.
        data = {"name": f"{run.dataset} (val)", "type": run.dataset, "split": "val"}
        task = {"type": "object-detection", "name": "Object Detection"}
        head["metrics"] = ["box AP", *(["mask AP"] if "segm/AP" in run.metrics else [])]
        results = [{"task": task, "dataset": data, "metrics": metrics}]
        head["model-index"] = [{"name": name, "results": results}]
    return head


def _named(metrics: Mapping[str, float]) -> Iterable[tuple[tuple[str, bool, str], float]]:
    """Detector ("" for the model's own), whether it is of masks, and metric, with its value."""
    for key, value in metrics.items():
        if found := _METRIC.fullmatch(key):
            yield (found[1] or "", found[2] is not None, found[3]), value


def _what_it_is(run: RecordedRun) -> str:
    target = run.setting("model._target_", UNKNOWN).rpartition(".")[2]
    backbone = run.setting("model.backbone.bottom_up._target_") or run.setting(
        "model.backbone._target_"
    )
    parts = [f"`{target}`"]
    if backbone is not None:
        parts.append(f"backbone `{backbone.rpartition('.')[2]}`")
    heads = run.heads
    if heads:
        parts.append(f"trained with the auxiliary heads {_codes(heads)} (K = {len(heads)})")
    what = "boxes and masks" if run.has_masks else "boxes"
    weights = run.weights
    names = run.class_names
    rows = [
        ("file", f"`{weights.path.name}`, {weights.size / 2**20:.1f} MiB"),
        ("SHA-256", f"`{weights.sha256}`"),
        ("model", f"{weights.numbers:,} parameters and buffers"),
        ("weights", _kind_of_weights(run)),
        ("trained for", UNKNOWN if weights.steps is None else f"{weights.steps} iterations"),
        ("auxiliary heads", _heads_in_file(run)),
        ("state of the training", "in it: it can be resumed" if weights.can_resume else "none"),
        (
            f"classes ({len(names)})" if weights.class_names else "classes, of the data",
            _listed(names) or UNKNOWN,
        ),
    ]
    return (
        f"A detector that gives {what}, of the [Co-DETR](https://arxiv.org/abs/2211.12860) family: "
        f"{', '.join(parts)}.\n\n{_table(('', ''), rows)}"
    )


def _kind_of_weights(run: RecordedRun) -> str:
    if run.weights.is_averaged:
        return "averaged over the training (EMA)"
    if run.setting("train.ema.enabled", False):
        return f"one set; whether it is the averaged one (EMA) is {UNKNOWN}"
    return "as trained, not averaged"


def _heads_in_file(run: RecordedRun) -> str:
    if not run.heads:
        return "none"
    return "stripped: the decoder alone" if run.weights.is_stripped else f"{_codes(run.heads)}"


def _usage(run: RecordedRun) -> str:
    from co_detr.engine.evaluation import best_detector
    from co_detr.modeling.detectors import DECODER

    file = run.weights.path.name
    command = f"co-detr predict --config-file config.yaml --checkpoint {file}"
    masks = "print(found.pred_masks)  # (N, H, W) without taking its memory\n" * run.has_masks
    text = f"""With `co_detr` installed (its wheel, then `co-detr install-detectron2`), in a folder
with `config.yaml` and `{file}`; from the hub, the checkpoint can also be named
`hf://OWNER/REPOSITORY/{file}`:

```bash
{command} picture.jpg --output drawn
co-detr eval --config-file config.yaml train.init_checkpoint={file} \\
    data.val=my/val.json data.val_images=my/images train.output_dir=evaluation
```

```python
import co_detr

predictor = co_detr.Predictor("config.yaml", "{file}")
found = predictor("picture.jpg")  # or a PIL image, an RGB array of uint8, or a list of these
found = found[found.scores >= 0.5]  # Detectron2's Instances
print(predictor.names(found), found.pred_boxes.tensor)  # absolute xyxy pixels
{masks}```"""
    best = best_detector(run.metrics, _kinds(run))
    if best in (None, DECODER) or run.weights.is_stripped:
        return text
    return (
        f"{text}\n\nThe best detector in the file is `{best}` (below): `--detector {best}` in the "
        f'first command, `detector="{best}"` in Python.'
    )


def _training_data(run: RecordedRun) -> str:
    rows = []
    for role, data in (("training", run.train), ("evaluation", run.val)):
        if data is None:
            file = os.path.basename(run.cfg.data["train" if role == "training" else "val"])
            rows.append((role, f"`{file}`", *[UNKNOWN] * 6))
            continue
        sizes = (data.images, data.empty, data.objects.total(), data.masks, len(data.objects))
        rows.append((role, f"`{data.file_name}`", *map(str, sizes), f"`{data.sha256}`"))
    header = ("", "file", "images", "without objects", "objects", "masks", "classes", "SHA-256")
    text = f"`{run.dataset}`, in COCO format:\n\n{_table(header, rows)}"
    if run.train is not None and len(run.train.objects) <= _MOST_CLASSES:
        counts = (f"{name}: {number}" for name, number in run.train.objects.items())
        text += f"\n\nObjects by class in training: {_plain(', '.join(counts))}."
    return text


def _procedure(run: RecordedRun) -> str:
    start = run.setting("train.init_checkpoint", "") or ""
    if urlsplit(start).scheme in ("", "file"):  # not a folder of this machine
        start = os.path.basename(start)
    ema = run.setting("train.ema.enabled", False)
    amp = run.setting("train.amp.enabled", False)
    resize = run.setting("dataloader.test.mapper.augmentations.short_edge")
    seconds = run.seconds_per_iteration
    optimizer = run.setting("optimizer._target_", UNKNOWN).rpartition(".")[2]
    rows = [
        ("config", "`config.yaml`, complete"),
        ("started from", f"`{start}`" if start else "random weights"),
        ("iterations", run.setting("train.max_iter", UNKNOWN)),
        ("images per iteration", run.setting("train.effective_batch_size", UNKNOWN)),
        ("optimizer, learning rate", f"{optimizer}, {run.setting('optimizer.lr', UNKNOWN)}"),
        ("average of weights (EMA)", run.setting("train.ema.decay", "on") if ema else "none"),
        ("precision", run.setting("train.amp.dtype", "mixed") if amp else "float32"),
        ("seed", run.setting("train.seed", UNKNOWN)),
        ("short edge of images in evaluation", UNKNOWN if resize is None else f"{resize} pixels"),
        ("begun", run.started or UNKNOWN),
        ("seconds per iteration", UNKNOWN if seconds is None else f"{seconds:.3g} (median)"),
    ]
    return _table(("", ""), [(name, str(value)) for name, value in rows])


def _results(run: RecordedRun) -> str:
    if not run.metrics:
        return (
            "These weights were not evaluated, or the evaluation is not recorded: there are no "
            "numbers."
        )
    steps = run.weights.steps
    after = "" if steps is None else f" after {steps} iterations"
    images = "" if run.val is None else f" on {run.val.images} images"
    parts = [f"COCO's metrics{after}{images}, from 0 to 100, of every detector in the model."]
    for masks, title in ((False, "Boxes"), (True, "Masks")):
        rows: dict[str, dict[str, str]] = {}
        for (kind, of_masks, metric), value in _named(run.metrics):
            if of_masks == masks and metric in _COLUMNS:
                rows.setdefault(kind or run.detector, {})[metric] = f"{value:.1f}"
        columns = [name for name in _COLUMNS if any(name in row for row in rows.values())]
        if columns:
            lines = [(kind, *(row.get(n, "") for n in columns)) for kind, row in rows.items()]
            parts.append(f"{title}:\n\n{_table(('detector', *columns), lines)}")
    kinds = _kinds(run)
    if explained := [text for kind, text in _EXPLAINED.items() if kind in kinds]:
        parts.append(f"{'; '.join(explained)}.")
    if run.weights.is_stripped and kinds:
        parts.append("Of these, the file has the decoder alone.")
    by_class = [
        (metric.removeprefix("AP-"), f"{value:.1f}")
        for (kind, masks, metric), value in _named(run.metrics)
        if not kind and not masks and metric.startswith("AP-")
    ]
    if len(by_class) > _MOST_CLASSES:
        parts.append(f"`per_class_ap.csv` has the AP of each of the {len(by_class)} classes.")
    elif by_class:
        parts.append(f"By class, boxes of `{run.detector}`:\n\n{_table(('class', 'AP'), by_class)}")
    return "\n\n".join(parts)


def _limits(run: RecordedRun) -> str:
    limits = []
    names = run.class_names
    known = f"the {len(names)} classes above" if names else "the classes of its training data"
    limits.append(f"It finds {known} and nothing else: all others were background in training.")
    train, val = run.train, run.val
    if train is None:
        limits.append("How many images and objects it has learned from is not recorded.")
    else:
        if train.images < FEW_IMAGES:
            limits.append(f"It has learned from {train.images} images, which is little.")
        absent = [name for name, number in train.objects.items() if not number]
        few = [f"{name} ({n})" for name, n in train.objects.items() if 0 < n < FEW_OBJECTS]
        if absent:
            limits.append(f"Classes without any object in training: {_listed(absent)}.")
        if few:
            limits.append(f"Classes with few objects in training: {_listed(few)}.")
        if run.has_masks and train.masks < train.objects.total():
            without = train.objects.total() - train.masks
            limits.append(f"{without} of its objects have no mask.")
    if not run.metrics:
        limits.append("How good it is, nobody has measured, as far as this run tells.")
    elif train is not None and val is not None and train.sha256 == val.sha256:
        limits.append(
            "It was evaluated on its training data: the numbers say nothing of other images."
        )
    elif run.weights.path.stem == "model_best":
        limits.append(
            "It was chosen among the checkpoints of its run by the images that the numbers are of, "
            "which flatters them a little."
        )
    limits.append("Nothing is known of images of another kind than those of its data.")
    return "\n".join(f"- {_plain(limit)}" for limit in limits)


def _license(run: RecordedRun, license_name: str | None) -> str:
    text = (
        "Unknown: whoever has trained these weights has not stated one. Ask before using them."
        if license_name is None
        else f"The weights are under `{license_name}`, as stated by whoever has trained them."
    )
    text += " The code, `co_detr`, is under Apache-2.0; the data have terms of their own"
    start = run.setting("train.init_checkpoint", "")
    return f"{text}, and so have the weights that it started from." if start else f"{text}."


def _software(run: RecordedRun) -> str:
    rows = list(run.software.items()) or [("in training", UNKNOWN)]
    return _table(("", ""), [*rows, ("this card was written by", f"co_detr {co_detr.__version__}")])


def _kinds(run: RecordedRun) -> list[str]:
    """Of detections beside the model's own, in the order of the evaluation."""
    return list(dict.fromkeys(kind for (kind, _, _), _ in _named(run.metrics) if kind))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines)


def _plain(text: str) -> str:
    """Text on one line that ends no cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _listed(names: Iterable[str]) -> str:
    from co_detr.data.coco_file import shortened

    return shortened(names, limit=_MOST_CLASSES)
