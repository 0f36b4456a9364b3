"""tools/analyze.py from end to end on tiny runs, and its errors."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate

from co_detr.checkpoint.saving import Checkpointer, RunIdentity
from co_detr.engine.config import load_config
from co_detr.engine.config_yaml import save_config
from co_detr.errors import ConfigError, DataError, exit_code
from co_detr.tools.analyze.command_line import MEASURES, choose_measures, parse_arguments, run
from co_detr.tools.analyze.subjects import load_models, load_samples, parse_model
from tests.analysis.cases import encoder_only_subject, plain, tiny_samples, tiny_subject
from tests.engine.tiny_data import TinyData, make_tiny_data
from tests.modeling.builders import (
    NUM_CLASSES,
    randomize,
    shrink,
    tiny_config,
    tiny_model,
)
from tests.paths import config_path

CLASSES = ["cell", "plate"]
SIZE = [
    "dataloader.test.mapper.augmentations.short_edge=96",
    "dataloader.test.mapper.augmentations.max_size=160",
]


@dataclasses.dataclass(frozen=True)
class Runs:
    """Output folders of runs with 0 and 2 auxiliary heads, and their data."""

    plain: Path
    hybrid: Path
    data: TinyData


def make_run(folder: Path, heads: int, data: TinyData, classes=CLASSES, overrides=()) -> Path:
    folder.mkdir()
    settings = [f"model.num_classes={len(classes)}", *SIZE, *data.overrides(folder), *overrides]
    save_config(tiny_config(heads, settings), str(folder / "config.yaml"))
    model = tiny_model(heads, [f"model.num_classes={len(classes)}"])
    for name, iteration in (("model_0000004", 4), ("model_final", 9)):
        randomize(model, iteration)
        Checkpointer(model, str(folder), class_names=list(classes)).save(name, iteration=iteration)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("runs")
    data = make_tiny_data(root)
    return Runs(make_run(root / "k0", 0, data), make_run(root / "k2", 2, data), data)


def analyze(*arguments) -> int:
    options = parse_arguments([str(argument) for argument in arguments])
    return exit_code(lambda: run(options))


def test_two_runs_give_a_report(runs, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--model", f"K = 0={runs.plain}", "--model", f"K = 2={runs.hybrid}"]
    assert analyze(*arguments, "--images", 4, "--output-dir", out, "--device", "cpu") == 0
    assert f"Wrote {out / 'report.html'}" in capsys.readouterr().out
    html = (out / "report.html").read_text()
    results = json.loads((out / "results.json").read_text())
    assert list(results["measures"]) == list(MEASURES)
    for key in MEASURES:
        assert f'<section id="{key}"' in html
        assert (out / f"{key}.json").is_file()
    assert [Path(name).name for name in results["images"]] == ["0.png", "2.png", "5.png", "7.png"]
    assert results["classes"] == CLASSES
    assert set(results["measures"]["positives"]) == {"K = 0", "K = 2"}
    assert "K = 0=" in results["command"] and "tools/analyze.py" in html
    intervals = results["measures"]["instability"]["intervals"]["K = 2"]
    assert [(interval["start"], interval["end"]) for interval in intervals] == [(5, 10)]


def test_a_measure_gives_the_same_alone_and_again(runs, tmp_path):
    numbers = []
    for name, measures in (("a", ["positives"]), ("b", ["instability", "positives"])):
        out = tmp_path / name
        common = ["--model", runs.hybrid, "--images", 3, "--output-dir", out, "--device", "cpu"]
        assert analyze(*common, "--only", *measures) == 0
        assert not (out / "errors.json").exists()
        numbers.append((out / "positives.json").read_text())
    assert numbers[0] == numbers[1]


def test_config_and_weights_on_another_set_without_a_run(runs, tmp_path):
    """The other set numbers its classes differently and lacks one."""
    content = json.loads(runs.data.train.read_text())
    content["categories"] = [{"id": 1, "name": "plate"}]
    content["annotations"] = [
        {**annotation, "category_id": 1}
        for annotation in content["annotations"]
        if annotation["category_id"] == 7
    ]
    (tmp_path / "plates.json").write_text(json.dumps(content))
    model = f"mine={runs.hybrid / 'config.yaml'},{runs.hybrid / 'model_final.pth'}"
    data = ["--data-json", tmp_path / "plates.json", "--data-images", runs.data.images]
    out = tmp_path / "out"
    common = ["--output-dir", out, "--images", 100, "--device", "cpu"]
    assert analyze("--model", model, *data, *common, "--only", "instability", "errors") == 0
    results = json.loads((out / "results.json").read_text())
    assert len(results["images"]) == 10
    assert "fewer than two checkpoints" in (out / "report.html").read_text()


def test_samples_have_the_classes_of_the_model(runs, tmp_path):
    cfg = tiny_config(0, ["model.num_classes=2", *SIZE, *runs.data.overrides(tmp_path)])
    samples = load_samples(cfg, ["plate", "dust", "cell"], 10)
    labels = [sample.input["instances"].gt_classes.tolist() for sample in samples]
    assert labels[:3] == [[], [2], [2, 0]]
    assert samples[1].input["image"].shape == (3, 96, 128)
    assert [sample.image_id for sample in samples[:3]] == [1, 2, 3]
    # Without a name in common, the order counts.
    by_order = load_samples(cfg, ["a", "b"], 10)
    labels = [sample.input["instances"].gt_classes.tolist() for sample in by_order[:3]]
    assert labels == [[], [0], [0, 1]]


@pytest.mark.parametrize(
    ("text", "name"), [("K = 2={run}", "K = 2"), ("{run}", "k2"), (" best = {run} ", "best")]
)
def test_names_of_models(runs, text, name):
    argument = parse_model(text.format(run=runs.hybrid))
    assert argument.name == name
    assert argument.config == str(runs.hybrid / "config.yaml")
    assert argument.weights == str(runs.hybrid / "model_final.pth")
    assert [path.name for path in argument.checkpoints] == ["model_0000004.pth", "model_final.pth"]


def test_paths_of_models_may_have_any_character(runs, tmp_path):
    odd = tmp_path / "lr=1,2 = x"
    odd.symlink_to(runs.hybrid)
    weights = f"{odd}/model_final.pth"
    for text, name in ((str(odd), "k2"), (f"K = 2={odd}", "K = 2")):
        argument = parse_model(text)
        assert (argument.name, argument.weights) == (name, weights)
    argument = parse_model(f"a={odd}/config.yaml,{weights}")
    assert (argument.name, argument.config, argument.weights) == (
        "a",
        f"{odd}/config.yaml",
        weights,
    )


def test_weights_of_an_unfinished_run(runs, tmp_path):
    (tmp_path / "config.yaml").write_text("")
    for name in ("model_0000004.pth", "model_0000009.pth"):
        (tmp_path / name).write_text("")
        assert parse_model(str(tmp_path)).weights == str(tmp_path / name)
    (tmp_path / "model_best.pth").write_text("")
    assert parse_model(str(tmp_path)).weights == str(tmp_path / "model_best.pth")


def test_checkpoints_of_another_run_in_the_folder_do_not_count(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    run = RunIdentity.new()
    run.write(str(tmp_path))
    for name, owner in (("final", "other"), ("0000004", run.run_id), ("0000009", "other")):
        torch.save({"trainer": {}, "run_id": owner}, tmp_path / f"model_{name}.pth")
    argument = parse_model(str(tmp_path))
    assert argument.weights == str(tmp_path / "model_0000004.pth")
    assert argument.checkpoints == (tmp_path / "model_0000004.pth",)


def test_one_checkpoint_of_a_run(runs):
    argument = parse_model(str(runs.hybrid / "model_0000004.pth"))
    assert argument.name == "model_0000004" and argument.checkpoints == ()
    assert argument.config == str(runs.hybrid / "config.yaml")
    assert argument.weights == str(runs.hybrid / "model_0000004.pth")


def test_a_zoo_name_takes_the_released_weights():
    argument = parse_model("co_dino_swin_l_36ep")
    assert (argument.name, argument.config, argument.weights) == ("co_dino_swin_l_36ep",) * 2 + (
        None,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine=", "names no model: write NAME=FOLDER"),
        ("mine=/not/there", "there is no /not/there"),
        ("mine={empty}", "has no config.yaml and no checkpoint"),
        ("mine={empty}/a.pth", "there is no .*/a.pth"),
        ("mine={empty}/alone.pth", "there is no config.yaml beside the checkpoint"),
    ],
)
def test_models_that_are_not_there(tmp_path, text, message):
    if "alone" in text:
        (tmp_path / "alone.pth").write_text("")
    with pytest.raises(ConfigError, match=message):
        parse_model(text.format(empty=tmp_path))


def test_models_that_cannot_be_compared(runs, tmp_path, capsys):
    other = make_run(tmp_path / "other", 0, runs.data, classes=["cat", "dog", "cow"])
    larger = ["dataloader.test.mapper.augmentations.short_edge=128"]
    resized = make_run(tmp_path / "resized", 0, runs.data, overrides=larger)
    ranged = make_run(tmp_path / "ranged", 0, runs.data, overrides=["data.value_range=[0,4095]"])
    common = ["--output-dir", tmp_path / "out", "--device", "cpu", "--model", runs.plain]
    for model, message in (
        (other, '"k0" has the classes (cell, plate) but "other" has (cat, dog, cow)'),
        (resized, '"k0" and "resized" read or resize images differently'),
        (ranged, '"k0" and "ranged" read or resize images differently'),
        (runs.plain, 'two models are called "k0"'),
    ):
        assert analyze(*common, "--model", model) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("error:") == 1 and "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "beauty"], "there is no measure beauty: choose "),
        (["--images", "0"], "--images 0 must be at least 1"),
        (["--data-json", "x.json"], "--data-json and --data-images belong together"),
        (["--data-json", "x.json", "--data-images", "."], "x.json does not exist"),
        (["--device", "abacus"], "there is no device 'abacus'"),
    ],
)
def test_wrong_arguments(runs, tmp_path, capsys, arguments, message):
    common = ["--model", runs.plain, "--output-dir", tmp_path / "out", "--device", "cpu"]
    assert analyze(*common, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_set_with_other_classes(runs, tmp_path):
    cfg = tiny_config(0, ["model.num_classes=3", *SIZE, *runs.data.overrides(tmp_path)])
    with pytest.raises(DataError, match="has the categories .cell, plate. but the model is for"):
        load_samples(cfg, ["cat", "dog", "cow"], 3)


def test_measures_keep_the_order_of_the_report():
    names = list(MEASURES)
    assert list(choose_measures(names[::-1])) == names == list(choose_measures(None))


@pytest.mark.parametrize("name", MEASURES)
def test_detectors_without_a_decoder(name):
    subjects = [encoder_only_subject(), tiny_subject(2)]
    (measure,) = choose_measures([name]).values()
    sections = [measure(chosen, tiny_samples(), plain) for chosen in (subjects[:1], subjects)]
    for section in sections:
        assert "encoder only" in section.text or section.tables
        json.dumps(section.numbers, allow_nan=False)
    assert sections[1].tables or name == "instability"  # which needs checkpoints


def test_masks_play_no_part(tmp_path):
    cfg = shrink(load_config(config_path("co_detr_r50_mask_rcnn")))
    cfg.model.num_classes = NUM_CLASSES
    model = instantiate(cfg.model)
    save_config(cfg, str(tmp_path / "config.yaml"))
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    models = load_models([parse_model(f"mask={tmp_path}")], torch.device("cpu"))
    for measure in choose_measures(["positives", "conflict"]).values():
        assert measure(models.subjects, tiny_samples(), plain).tables
