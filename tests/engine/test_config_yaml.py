"""A YAML config is read without running anything in it, wherever one is read."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from detectron2.config import LazyConfig, instantiate
from omegaconf import OmegaConf
from torch.nn import LazyLinear

import co_detr
from co_detr.engine.config import load_config
from co_detr.engine.config_yaml import PACKAGES_VARIABLE, config_content, save_config
from co_detr.errors import ConfigError
from co_detr.tools.ablate.grid import read_grid_file
from co_detr.tools.analyze.subjects import load_models, parse_model
from co_detr.tools.demo import command_line as demo
from co_detr.tools.predict import command_line as predict
from tests.engine.processes import CONFIG_FILE
from tests.paths import ROOT, config_path, experiments, python_path

CONFIGS = [path for name, path in experiments().items() if name not in experiments("ablation")]
# Without those that are another with other numbers.
DISTINCT = [path for path in CONFIGS if not re.search("_(24|36)ep|_swin_[sb]_|9enc", path.stem)]

# Each would leave a file "ran" if it were obeyed.
HOSTILE = [
    'model: !!python/object/apply:os.system ["touch ran"]',
    'model: !!python/object/new:os.system ["touch ran"]',
    'model: !!python/object/apply:subprocess.check_call [["touch", "ran"]]',
    "model: !!python/object/apply:builtins.eval [\"open('ran', 'w')\"]",
    "model: {a: [!!python/object/apply:os.system ['touch ran']]}",
    "model: !!python/module:antigravity",
    "model: !!python/name:os.system",
    "model: !!python/name:torch.nn.functional.os.system",
    "model: !!python/object:collections.Counter {a: 1}",
    "model: !shell touch ran",
]
HOSTILE_TARGETS = [
    "{_target_: os.system, command: touch ran}",
    "{_target_: builtins.exec, source: x}",
    "{_target_: torch.nn.functional.os.system, command: touch ran}",
    "{_target_: torch.hub.load, repo_or_dir: a/b, model: x}",
    "{_target_: co_detr.checkpoint.reading.read_checkpoint, path: x, unsafe: true}",
    "{_target_: pip.main, args: [install, x]}",
    "{_target_: [os.system]}",
    "{_target_: '${train.name}'}",
    "{_target_: {_target_: operator.attrgetter}}",
    "{a: '${oc.create:{_target_:os.system,command:x}}'}",
    "{a: '${oc.env:HOME}'}",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _entry_points(file, folder):
    """Calls by which a config.yaml of somebody else is read."""
    file = str(file)
    model = ["--config-file", file, "--checkpoint", "w.pth"]
    return {
        "load_config": lambda: load_config(file),
        "Predictor": lambda: co_detr.Predictor(file, "w.pth"),
        "predict.py": lambda: predict.run(
            predict.parse_arguments([*model, str(folder), "--output", str(folder / "out")])
        ),
        "demo.py": lambda: demo.run(demo.parse_arguments(model)),
        "analyze": lambda: load_models([parse_model(str(folder))], "cpu"),
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("load_config", text) for text in HOSTILE),
        *((name, HOSTILE[0]) for name in ("Predictor", "predict.py", "demo.py", "analyze")),
    ],
)
def test_tags_that_run_code_are_refused_by_name(folder, name, text):
    (folder / "config.yaml").write_text(text)
    (folder / "model_final.pth").write_bytes(b"")
    (folder / "w.pth").write_bytes(b"")
    (folder / "a.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"config\.yaml was refused: ") as caught:
        _entry_points(folder / "config.yaml", folder)[name]()
    assert text.split("!")[-1].split()[0].split(":")[-1] in caught.value.sentence
    assert not (folder / "ran").exists()
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("node", HOSTILE_TARGETS)
def test_targets_and_references_that_no_config_needs_are_refused(folder, node):
    cfg = yaml.safe_load(_quickstart_text())
    cfg["train"]["name"] = "os.system"
    cfg["model"]["postprocessor"] = yaml.safe_load(node)
    (folder / "config.yaml").write_text(yaml.dump(cfg))
    with pytest.raises(ConfigError, match=r"was refused: .*model\.postprocessor"):
        load_config("config.yaml")


@pytest.mark.slow
def test_a_refused_target_leaves_python_as_it_was(folder):
    """A training after it, which imports setuptools through PyTorch, failed in the same process."""
    script = """
from co_detr.engine.config_yaml import _is_allowed
assert not _is_allowed("pip.main")
import setuptools
"""
    environment = os.environ | {"PYTHONPATH": python_path()}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr


def _quickstart_text():
    cfg = load_config(config_path("quickstart"))
    cfg.model.backbone.bottom_up.stem.norm = "GN"
    path = Path("quickstart.yaml")
    save_config(cfg, str(path))
    return path.read_text().replace("!!python/", "tag-")


@pytest.mark.slow
def test_train_net_and_grids_refuse_it_too(folder, train_net):
    text = 'data: !!python/object/apply:os.system ["touch ran"]\n'
    (folder / "config.yaml").write_text(text)
    result = train_net(config=str(folder / "config.yaml"))
    assert result.returncode == 2 and "Traceback" not in result.output
    assert "was refused: the tag !!python/object/apply:os.system in line 1" in result.output
    (folder / "grid.yaml").write_text(f"variants: []\n{text}")
    with pytest.raises(ConfigError, match="is no YAML"):
        read_grid_file("grid.yaml")
    assert not (folder / "ran").exists() and not (ROOT / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("path", DISTINCT, ids=lambda path: path.stem)
def test_every_config_can_be_written_and_read_again(path, tmp_path):
    cfg = load_config(str(path))
    save_config(cfg, str(tmp_path / "config.yaml"))
    again = load_config(str(tmp_path / "config.yaml"))
    assert config_content(again) == config_content(cfg)


@pytest.mark.parametrize(
    "name",
    [
        "co_dino_vit_l_o365_12ep",
        "co_detr_r50_mask_rcnn",
        "quickstart",
        "co_dino_r50_lsj_12ep",
        "co_dino_r50_instance",
        "co_dab_detr_r50",
    ],
)
def test_what_detectron2_writes_is_read(name, tmp_path):
    """As earlier versions did."""
    cfg = load_config(config_path(name))
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    expected = OmegaConf.to_container(LazyConfig.load(str(tmp_path / "config.yaml")))
    assert OmegaConf.to_container(load_config(str(tmp_path / "config.yaml"))) == expected
    save_config(cfg, str(tmp_path / "ours.yaml"))
    assert OmegaConf.to_container(load_config(str(tmp_path / "ours.yaml"))) == expected


def test_tuples_and_classes_are_kept(tiny_cfg, tmp_path):
    cfg = tiny_cfg()
    content = OmegaConf.to_container(cfg)
    content["model"]["sizes"] = {"pair": (1, (2, 3)), "norm": LazyLinear}
    text = yaml.dump(content, sort_keys=False)
    assert "!!python/tuple" in text and "!!python/name" in text
    (tmp_path / "config.yaml").write_text(text)
    sizes = load_config(str(tmp_path / "config.yaml")).model.sizes
    assert sizes.norm is LazyLinear and list(sizes.pair) == [1, [2, 3]]


def test_own_modules_may_be_named_and_installed_ones_if_allowed(tiny_cfg, tmp_path, monkeypatch):
    save_config(tiny_cfg(), str(tmp_path / "config.yaml"))
    assert type(instantiate(load_config(str(tmp_path / "config.yaml")).model)).__module__ == (
        "tests.engine.tiny_detector"
    )
    text = (tmp_path / "config.yaml").read_text()
    text = text.replace("tests.engine.tiny_detector.TinyDetector", "yaml.nodes.ScalarNode")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"set the environment variable {PACKAGES_VARIABLE}"):
        load_config(str(tmp_path / "config.yaml"))
    monkeypatch.setenv(PACKAGES_VARIABLE, "other, yaml")
    assert load_config(str(tmp_path / "config.yaml")).model._target_ == "yaml.nodes.ScalarNode"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [1", r"is no YAML \(expected ',' or '\]'.* in line 1\)"),
        (b"model: \xff", "is no YAML"),
        (b"", "has no keys"),
        (b"- 1", "has no keys"),
        (b"model: {_target_: co_detr.modeling.Nothing}", "Nothing does not exist"),
        (b"model: &a {b: *a}", "a part of it contains itself"),
        (b"model: 1", "does not define optimizer, lr_multiplier"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, message):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(str(tmp_path / "config.yaml"))
    assert "\n" not in caught.value.sentence


def test_other_endings(tmp_path):
    (tmp_path / "config.txt").write_text(Path(CONFIG_FILE).read_text())
    with pytest.raises(ConfigError, match="is neither .py nor .yaml"):
        load_config(str(tmp_path / "config.txt"))
