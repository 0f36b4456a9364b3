"""Models by name, and where their weights come from."""

import hashlib
import runpy
from pathlib import Path

import pytest
import torch

from co_detr import model_zoo
from co_detr.errors import CheckpointError, ConfigError
from co_detr.model_zoo import config_file
from co_detr.model_zoo.table import ZooEntry
from tests.checkpoint.official import ROOT
from tests.modeling.builders import EXPERIMENTS
from tests.paths import experiments


@pytest.fixture
def released(monkeypatch, tmp_path):
    """The small model as if its weights had been released; returns the folder they come from."""
    source = tmp_path / "server" / "small.pth"
    source.parent.mkdir()
    torch.save({"model": model_zoo.get("quickstart", device="cpu").state_dict()}, source)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    entry = ZooEntry(
        "quickstart", "", checkpoint="small.pth", page="a page", url=source.as_uri(), sha256=digest
    )
    monkeypatch.setitem(model_zoo.ZOO, "quickstart", entry)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(model_zoo.FOLDER_VARIABLE, raising=False)
    return source


def test_every_config_is_in_the_table():
    assert set(model_zoo.list()) == set(EXPERIMENTS)
    assert all(entry.name == name for name, entry in model_zoo.ZOO.items())


def test_configs_by_name():
    assert model_zoo.get_config("co_detr_r50").model.num_classes == 80
    assert model_zoo.get_config("quickstart.py").model.num_classes == 10
    with pytest.raises(ConfigError, match="did you mean co_detr_r50?"):
        model_zoo.get_config("co_dert_r50")


def test_a_name_finds_its_config_in_the_folder_of_any_family():
    for name, path in experiments().items():
        assert config_file(name) == path
    parts = {path for part in ("common", "models") for path in (ROOT / "configs" / part).glob("*")}
    files = {path for path in (ROOT / "configs").rglob("*.py")} - parts
    assert files == set(experiments().values())  # no two have one name
    for part in ("coco", "train", "deformable_detr"):  # in common and in models
        with pytest.raises(ConfigError, match="there is no model"):
            config_file(part)


def test_configs_inside_an_installed_package(monkeypatch, tmp_path):
    package = tmp_path / "site-packages" / "co_detr"
    (package / "configs" / "common").mkdir(parents=True)
    monkeypatch.setattr(model_zoo.co_detr, "__file__", str(package / "__init__.py"))
    with pytest.raises(ConfigError, match="install co_detr again"):
        model_zoo.config_directory()
    (package / "configs" / "common" / "train.py").touch()
    assert model_zoo.config_directory() == package / "configs"


def test_setup_installs_every_config(monkeypatch):
    settings = {}
    monkeypatch.setenv("CO_DETR_NO_EXT", "1")
    monkeypatch.setattr("setuptools.setup", lambda **given: settings.update(given))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    for path in (ROOT / "configs").rglob("*.py"):
        folder = path.parent.relative_to(ROOT)
        package = ".".join(["co_detr", *folder.parts])
        assert package in settings["packages"]
        assert settings["package_dir"][package] == str(folder)


def test_weights_are_fetched_once_and_checked(released, tmp_path):
    expected = torch.load(released)["model"]
    model = model_zoo.get("quickstart", trained=True, device="cpu")
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert model_zoo.get_checkpoint_url("quickstart") == released.as_uri()
    released.unlink()
    cached = model_zoo.resolve_checkpoint("quickstart")
    assert Path(cached).is_relative_to(tmp_path / "cache")


def test_a_fetched_file_with_another_checksum_is_not_kept(released, tmp_path):
    released.write_bytes(b"something else")
    with pytest.raises(CheckpointError, match="is another file than it should be"):
        model_zoo.resolve_checkpoint("quickstart")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_an_offline_machine_is_told_which_file_to_put_where(released, monkeypatch, tmp_path):
    released.rename(tmp_path / "small.pth")
    with pytest.raises(CheckpointError, match=f"by other means and put it at {tmp_path / 'cache'}"):
        model_zoo.resolve_checkpoint("quickstart")
    monkeypatch.setenv(model_zoo.FOLDER_VARIABLE, str(tmp_path))
    assert model_zoo.resolve_checkpoint("quickstart") == str(tmp_path / "small.pth")


def test_a_named_file_comes_first(released, tmp_path):
    assert model_zoo.resolve_checkpoint("quickstart", released) == str(released)
    with pytest.raises(CheckpointError, match="does not exist"):
        model_zoo.resolve_checkpoint("quickstart", tmp_path / "nothing.pth")


def test_models_without_an_address_or_without_weights(monkeypatch, tmp_path):
    monkeypatch.delenv(model_zoo.FOLDER_VARIABLE, raising=False)
    with pytest.raises(CheckpointError, match="co_deformable_detr_r50_1x_coco.pth from https"):
        model_zoo.get_checkpoint_url("co_detr_r50")
    with pytest.raises(CheckpointError, match="from https.* and put it into a folder and set CO_D"):
        model_zoo.resolve_checkpoint("co_detr_r50")
    monkeypatch.setenv(model_zoo.FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(CheckpointError, match=f"and put it into {tmp_path}"):
        model_zoo.resolve_checkpoint("co_detr_r50")
    with pytest.raises(CheckpointError, match="no weights were released for quickstart"):
        model_zoo.get("quickstart", trained=True)


def test_an_entry_is_complete():
    with pytest.raises(ValueError, match="a sha256 needs a url"):
        ZooEntry("a", "", checkpoint="a.pth", page="p", sha256="00")
    with pytest.raises(ValueError, match="a checkpoint needs a page"):
        ZooEntry("a", "", checkpoint="a.pth")
