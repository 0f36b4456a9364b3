"""Files and settings of earlier versions still work.

Query sources had numbers in version 0.1, and the centerness of a head another spelling.
"""

import logging

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate

from co_detr import model_zoo
from co_detr.checkpoint.detector import load_detector
from co_detr.checkpoint.loading import load_weights, with_present_names
from co_detr.checkpoint.official import restore_official
from co_detr.checkpoint.saving import Checkpointer
from co_detr.engine.config import load_config
from co_detr.engine.config_yaml import config_text, save_config
from co_detr.engine.hooks import AveragedWeights, EmaSettings
from co_detr.errors import CheckpointError, ConfigError
from co_detr.modeling.queries import QuerySources
from co_detr.moved import named_sources
from tests.device import DEVICE
from tests.modeling.builders import detect, make_batch, randomize, shrink, tiny_model
from tests.paths import config_path

OVERRIDES = ["model.auxiliary=null", "model.num_classes=5"]


def make_config():
    return shrink(load_config(config_path("co_dino_r50"), OVERRIDES))


def make_model(cfg=None):
    torch.manual_seed(0)
    model = instantiate((cfg or make_config()).model).to(DEVICE)
    randomize(model)
    return model


def with_numbers(state, names=("matching", "denoising")):
    """Tensors under the names that version 0.1 gave them."""
    for number, name in enumerate(names):
        state = {key.replace(f"queries.{name}.", f"queries.{number}."): state[key] for key in state}
    return state


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_names_of_an_old_file():
    model = make_model()
    old = with_numbers(model.state_dict())
    assert "queries.1.label_embedding.weight" in old
    assert same(with_present_names(old, model), model.state_dict())
    assert same(with_present_names(model.state_dict(), model), model.state_dict())


@pytest.mark.parametrize("stripped", [False, True])
def test_an_old_file_predicts(stripped, tmp_path):
    """Also where another source came before the one of inference, in the list as in the file."""
    cfg = make_config()
    sources = cfg.model.queries
    cfg.model.queries = L(QuerySources)(denoising=sources.denoising, matching=sources.matching)
    model = make_model(cfg)
    expected = detect(model, make_batch())
    names = ("denoising", "matching")
    if stripped:
        model.strip_auxiliary()
        names = ("matching",)
    torch.save({"model": with_numbers(model.state_dict(), names)}, tmp_path / "model.pth")
    found = load_detector(cfg, tmp_path / "model.pth").model.to(DEVICE)
    for one, other in zip(detect(found, make_batch()), expected, strict=True):
        assert torch.equal(one.scores, other.scores)


def with_old_modules(state):
    """Tensors under the names that heads gave them before."""
    return {key.replace(".centerness.", ".centreness."): value for key, value in state.items()}


def test_modules_of_heads_of_an_old_file():
    model = tiny_model(heads=1)
    old = with_old_modules(model.state_dict())
    assert "auxiliary.heads.atss.centreness.weight" in old
    assert same(with_present_names(old, model), model.state_dict())
    other = tiny_model(heads=1, seed=1)
    assert load_weights(other, {"model": old}, "model.pth", parts="whole").complete
    assert same(other.state_dict(), model.state_dict())


def test_a_module_of_a_users_head_keeps_its_name():
    model = tiny_model(heads=1)
    model.auxiliary.heads["atss"].centreness = torch.nn.Linear(2, 1)
    assert same(with_present_names(model.state_dict(), model), model.state_dict())


@pytest.mark.parametrize(
    ("make", "old_names"),
    [(make_model, with_numbers), (lambda: tiny_model(heads=1), with_old_modules)],
    ids=["sources", "modules"],
)
def test_a_training_goes_on_from_an_old_file(make, old_names, tmp_path):
    """With the state of the optimizer, which knows parameters by their order, and the average."""
    model = make()
    averaged = AveragedWeights(model, EmaSettings(decay=0.9, warmup_iterations=0))
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    averaged.update_parameters(model)
    content = {"model": model.state_dict(), "ema": averaged.state_dict()}
    content = {key: old_names(value) for key, value in content.items()}
    assert content["ema"].keys() != averaged.state_dict().keys()
    torch.save({**content, "optimizer": optimizer.state_dict()}, tmp_path / "model_final.pth")

    other = make()
    parts = {
        "ema": AveragedWeights(other, averaged.settings),
        "optimizer": torch.optim.AdamW(other.parameters()),
    }
    loader = Checkpointer(other, str(tmp_path), weights=None, **parts)
    loader.load(str(tmp_path / "model_final.pth"), resuming=True)
    assert same(other.state_dict(), model.state_dict())
    assert same(parts["ema"].state_dict(), averaged.state_dict())
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert same(optimizer.state[one], parts["optimizer"].state[two])


def test_an_old_file_becomes_one_of_the_reference():
    model = make_model()
    old = restore_official(with_numbers(model.state_dict()), model)
    assert same(old.state_dict, restore_official(model.state_dict(), model).state_dict)
    assert load_weights(make_model(), {"state_dict": old.state_dict}, "model.pth").complete


def test_the_config_of_an_old_file_is_found(monkeypatch):
    few = ("deformable_detr_r50", "co_dino_r50", "co_detr_r50")
    monkeypatch.setattr(model_zoo, "ZOO", {name: model_zoo.ZOO[name] for name in few})
    cfg = load_config(config_path("co_detr_r50"))
    with torch.device("meta"):
        state = with_old_modules(with_numbers(instantiate(cfg.model).state_dict()))
    state["decoder.class_heads.0.bias"] = torch.zeros(80)  # tells the number of classes
    assert model_zoo.choose_config(state, official=False).name == "co_detr_r50"


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        ([None], "None, which is no query source: give it a _target_"),
        ([{"num_queries": 3}], "no query source"),
        ([{"_target_": {}}], "no query source"),
        (
            [{"_target_": "a.TwoStageQueries"}] * 2,
            r"two sources of one name \(matching, matching\)",
        ),
        ([{"_target_": "a.DenoisingQueries", "sees": "${..1.name}"}], "sees number 1 of 1 sources"),
    ],
)
def test_a_wrong_list_is_one_sentence(sources, sentence):
    with pytest.raises(ConfigError, match=sentence):
        named_sources(sources)


def test_names_of_a_list():
    assert named_sources([]) is None
    kinds = ["co_detr.modeling.queries.TwoStageQueries", "mine.MyDenoisingQueries"]
    named = named_sources([{"_target_": kind} for kind in kinds])
    assert list(named) == ["matching", "denoising", "_target_"]


def test_an_old_override_names_the_present_key(caplog):
    with caplog.at_level(logging.WARNING):
        cfg = load_config(config_path("co_dino_r50"), ["model.queries.1.num_queries=40"])
    assert cfg.model.queries.denoising.num_queries == 40
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "model.queries.1.num_queries is called model.queries.denoising.num_queries" in warning
    with pytest.raises(ConfigError, match="model.queries.2.num_queries names no key"):
        load_config(config_path("co_dino_r50"), ["model.queries.2.num_queries=40"])


def test_an_old_config_keeps_its_order_and_references(tmp_path):
    """Names are those that the sources had; a reference to one becomes the name."""
    config = tmp_path / "config.py"
    config.write_text(
        "from detectron2.config import LazyConfig\n"
        f"cfg = LazyConfig.load({config_path('co_dino_r50')!r})\n"
        "model, optimizer, data = cfg.model, cfg.optimizer, cfg.data\n"
        "lr_multiplier, dataloader, train = cfg.lr_multiplier, cfg.dataloader, cfg.train\n"
        "first, second = model.queries.matching, model.queries.denoising\n"
        "first.name, second.sees = 'main', '${..1.name}'\n"
        "model.queries = [second, first]\n"
    )
    cfg = load_config(str(config), ["model.queries.1.num_queries=20"])
    assert list(cfg.model.queries) == ["denoising", "main", "_target_"]
    assert cfg.model.queries.denoising.sees == "main"
    assert cfg.model.queries.main.num_queries == 20 and "name" not in cfg.model.queries.main
    save_config(cfg, str(tmp_path / "config.yaml"))
    assert config_text(load_config(str(tmp_path / "config.yaml"))) == config_text(cfg)


def test_an_unfit_file_is_told_from_both_sides():
    """What the file lacks, and what it has instead."""
    state = make_model().state_dict()
    state = {key.replace("decoder.layers.", "decoder.blocks."): state[key] for key in state}
    with pytest.raises(CheckpointError) as found:
        load_weights(make_model(), {"model": state}, "model.pth")
    assert "decoder.layers.0.self_attention.in_proj_weight is not in" in str(found.value)
    assert "decoder.blocks.0.self_attention.in_proj_weight is not in" in str(found.value)
