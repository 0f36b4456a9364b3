"""``co-detr card``: what it says of a run, and whether what it tells people to type works."""

import json
import re
import shlex
import shutil
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.collect_env import collect_env_info

from co_detr.checkpoint.saving import Checkpointer, RunIdentity
from co_detr.command_line import main
from co_detr.engine.config import load_config
from co_detr.errors import CheckpointError, ConfigError
from co_detr.files import sha256_of
from co_detr.tools.model_card import model_card, parse_arguments, run
from co_detr.tools.recorded_run import read_run
from tests.engine.tiny_data import make_tiny_data
from tests.paths import ROOT, config_path
from tests.prediction.trained_run import CLASSES

METRICS = {
    **{"AP": 31.25, "AP50": 62.5, "APl": None, "AP-red cell": 40.0},
    **{"segm/AP": 20.5, "roi/AP": 33.5, "roi/AP50": 60.0, "roi/segm/AP": 21.5},
    **{"merged/AP": 32.0, "val_loss/total": 4.0},
}


@pytest.fixture(scope="module")
def environment():
    """What a training writes as environment.txt."""
    return f"{collect_env_info()}\nGPU 0    Some Card 80GB (arch=9.0)\n"


@pytest.fixture
def finished(trained, environment, tmp_path):
    """A folder with all that a training leaves, beside its data; `make(other)` copies another."""
    data = make_tiny_data(tmp_path)
    for path in tmp_path.glob("*.json"):
        content = json.loads(path.read_text())
        for category, name in zip(content["categories"], CLASSES, strict=False):
            category["name"] = name
        path.write_text(json.dumps(content))

    def make(source=trained, metrics=METRICS):
        folder = tmp_path / "mine"
        shutil.copytree(source.folder, folder)
        cfg = LazyConfig.load(source.config)
        for override in data.overrides(folder):
            key, _, value = override.partition("=")
            node, _, name = key.partition(".")
            cfg[node][name] = value
        LazyConfig.save(cfg, str(folder / "config.yaml"))
        (folder / "environment.txt").write_text(environment)
        RunIdentity.new().write(str(folder))
        if metrics:
            (folder / "metrics.json").write_text(json.dumps(metrics))
        return folder

    return make


def card_of(folder, *arguments):
    run(parse_arguments([str(folder), *arguments]))
    return (folder / "README.md").read_text()


def head_of(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_of_a_run(finished, tmp_path, capsys):
    folder = finished()
    Checkpointer(trained_model(folder), str(folder), class_names=CLASSES).save(
        "model_best", iteration=19
    )
    history = {"10": {"AP": 1.0}, "20": {k: v for k, v in METRICS.items() if v is not None}}
    (folder / "evaluations.json").write_text(json.dumps(history))
    (folder / "metrics.json").write_text('{"AP": 2.0}')  # of other weights: the final ones
    card = card_of(folder, "--license", "cc-by-4.0", "--name", "Cells: a | b")
    head = head_of(card)
    assert head["license"] == "cc-by-4.0" and head["pipeline_tag"] == "object-detection"
    assert head["library_name"] == "co_detr" and head["datasets"] == [tmp_path.name]
    (index,) = head["model-index"]
    (result,) = index["results"]
    assert index["name"] == "Cells: a | b"
    assert [(m["type"], m.get("name"), m["value"]) for m in result["metrics"]] == [
        ("box AP", None, 31.25),
        ("box AP50", None, 62.5),
        ("mask AP", None, 20.5),
        ("box AP", "AP of roi", 33.5),
        ("mask AP", "AP of roi", 21.5),
        ("box AP", "AP of merged", 32.0),
    ]
    assert "| decoder | 31.2 | 62.5 |" in card and "| roi | 33.5 | 60.0 |" in card
    assert "`merged` joins" in card and "| merged | 32.0 |  |" in card and "| roi | 21.5 |" in card
    assert "| red cell | 40.0 |" in card and "after 20 iterations on 10 images" in card
    assert "`--detector roi`" in card and "| auxiliary heads | `atss`, `roi` |" in card
    assert sha256_of(folder / "model_best.pth") in card and "| classes (5) | red cell, " in card
    assert (
        f"| training | `train.json` | 10 | 4 | 9 | 0 | 2 | `{sha256_of(tmp_path / 'train.json')}`"
        in card
    )
    assert "Classes with few objects in training: red cell (6), white cell (3)." in card
    assert "evaluated on its training data" in card  # the two files are the same
    assert f"| PyTorch | {torch.__version__} |" in card and "| GPU 0 | Some Card 80GB |" in card
    assert str(tmp_path) not in card
    assert "No license" not in capsys.readouterr().out


def trained_model(folder):
    """A model of the folder's config, with its weights."""
    model = instantiate(load_config(str(folder / "config.yaml")).model)
    model.load_state_dict(torch.load(folder / "model_final.pth")["model"])
    return model


def test_the_hub_can_read_it(finished):
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(card_of(finished()))
    assert card.data.license == "unknown" and card.data.model_name == "mine"
    values = {(r.metric_type, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert values["box AP", None] == 31.25 and values["box AP", "AP of merged"] == 32.0
    assert "has not stated one" in card.text


def python_of(card):
    (block,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    return block.replace("0.5", "0.0")  # weights are random


def test_what_it_tells_to_type_works(finished, photos, tmp_path, monkeypatch, capsys):
    folder = finished()
    card = card_of(folder)
    shutil.copy(photos / "a.png", folder / "picture.jpg")
    monkeypatch.chdir(folder)
    names = {}
    exec(python_of(card), names)
    assert len(names["found"]) and names["predictor"].class_names == CLASSES
    (bash,) = re.findall(r"```bash\n(.*?)```", card, flags=re.DOTALL)
    bash = bash.replace("my/val.json", str(tmp_path / "val.json"))
    bash = bash.replace("my/images", str(tmp_path / "images"))
    for command in bash.replace("\\\n", " ").splitlines():
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        assert main() == 0, capsys.readouterr().err
    assert (folder / "drawn" / "predictions.json").exists()
    assert "AP" in json.loads((folder / "evaluation" / "metrics.json").read_text())


def test_masks(finished, masked, photos, monkeypatch):
    folder = finished(masked)
    card = card_of(folder)
    assert "instance-segmentation" in head_of(card)["tags"]
    shutil.copy(photos / "a.png", folder / "picture.jpg")
    monkeypatch.chdir(folder)
    names = {}
    exec(python_of(card), names)
    assert len(names["found"].pred_masks) == len(names["found"]) > 0
    assert "9 of its objects have no mask" in card


def test_masks_of_a_head_are_not_those_of_the_decoder(finished):
    cfg = load_config(config_path("co_detr_r50_mask_rcnn"))
    found = replace(read_run(finished()), cfg=cfg)
    assert found.detector == "decoder" and not found.has_masks
    cfg.model.evaluate_with = "roi"
    assert found.detector == "roi" and found.has_masks


def test_what_is_not_there_is_not_recorded(finished, tmp_path, capsys):
    folder = finished(metrics=None)
    for name in ("environment.txt", "run.json"):
        (folder / name).unlink()
    (tmp_path / "train.json").unlink()
    card = card_of(folder)
    head = head_of(card)
    assert "model-index" not in head and "metrics" not in head
    assert "These weights were not evaluated" in card and "nobody has measured" in card
    assert "| training | `train.json` | not recorded |" in card
    assert "| in training | not recorded |" in card and "| begun | not recorded |" in card
    said = capsys.readouterr().out
    assert f"{tmp_path / 'train.json'} is not there" in said and "No license is stated" in said


def test_numbers_of_other_weights_are_not_taken(finished):
    folder = finished()
    (folder / "model_final.pth").rename(folder / "model_0000009.pth")
    found = read_run(folder)
    assert found.weights.path.name == "model_0000009.pth"
    assert found.metrics == {}  # metrics.json is that of the final ones


def test_smaller_files(finished):
    """The weights alone, as the page says, and without the auxiliary heads."""
    folder = finished()
    history = {"4": {"AP": 7.0, "roi/AP": 8.0}}
    (folder / "evaluations.json").write_text(json.dumps(history))
    content = torch.load(folder / "model_final.pth") | {"iteration": 3, "trainer": {}}
    averaged = {f"module.{name}": value * 2 for name, value in content["model"].items()}
    torch.save(
        content | {"ema": averaged | {"n_averaged": torch.tensor(4)}}, folder / "model_best.pth"
    )
    whole = read_run(folder)
    assert whole.weights.is_averaged and whole.weights.can_resume
    assert "| weights | averaged over the training (EMA) |" in model_card(whole, "whole")
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    (python,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(python.replace("output/mine", str(folder)), {})
    found = read_run(folder, folder / "weights.pth")
    assert found.metrics == history["4"] and not found.weights.can_resume
    assert found.weights.numbers == whole.weights.numbers
    kept = torch.load(folder / "weights.pth")["model"]
    assert all(torch.equal(value, averaged[f"module.{name}"]) for name, value in kept.items())
    assert "| weights | as trained, not averaged |" in model_card(found, "kept")
    found.cfg.train.ema.enabled = True
    assert "whether it is the averaged one (EMA) is not recorded" in model_card(found, "kept")
    content["model"] = {k: v for k, v in content["model"].items() if "auxiliary." not in k}
    torch.save(content, folder / "small.pth")
    card = model_card(read_run(folder, folder / "small.pth"), "small")
    assert "| auxiliary heads | stripped: the decoder alone |" in card
    assert "| decoder | 7.0 |" in card and "the file has the decoder alone" in card
    assert "--detector" not in card


def test_errors_are_one_sentence(finished, tmp_path):
    with pytest.raises(ConfigError, match=r"config\.yaml does not exist: name the output folder"):
        card_of(tmp_path)
    folder = finished()
    (folder / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"README\.md exists: .*--force"):
        card_of(folder)
    assert card_of(folder, "--force") != "mine"
    Checkpointer(trained_model(folder), str(folder)).save("model_final", iteration=3)
    (folder / "evaluations.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"evaluations\.json is no history"):
        card_of(folder, "--force")
    (folder / "model_final.pth").unlink()
    with pytest.raises(CheckpointError, match=r"mine has no checkpoint"):
        card_of(folder, "--force")
