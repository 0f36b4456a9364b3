"""tools/convert_official.py: finds the config, converts both ways, accounts for every tensor."""

import importlib.util

import pytest
import torch

from tests.checkpoint.official import ROOT, distinct, same
from tests.paths import config_path

specification = importlib.util.spec_from_file_location(
    "convert_official", ROOT / "tools" / "convert_official.py"
)
tool = importlib.util.module_from_spec(specification)
specification.loader.exec_module(tool)

NAMES = tuple(f"class {number}" for number in range(80))


@pytest.fixture
def run(tmp_path, capsys):
    """Writes `state` as an official file, runs the tool on it; returns status and messages."""

    def run(state, *options, wrapper="state_dict", prefix="module."):
        content = {wrapper: {prefix + key: value for key, value in state.items()}}
        torch.save(content | {"meta": {"CLASSES": NAMES}}, tmp_path / "in.pth")
        status = tool.main([str(tmp_path / "in.pth"), str(tmp_path / "out.pth"), *options])
        output = capsys.readouterr()
        return status, output.out + output.err

    return run


def add_average(path):
    """Makes the weights of a file its averaged ones, with raw ones that are all zero."""
    content = torch.load(path)
    averaged = {f"module.{key}": value for key, value in content["model"].items()}
    raw = {key: torch.zeros_like(value) for key, value in content["model"].items()}
    ema = {"n_averaged": torch.tensor(9), **averaged}
    torch.save({**content, "model": raw, "ema": ema}, path)


@pytest.mark.parametrize("name", ["co_detr_r50", "co_dino_r50"])
def test_both_ways_with_the_config_found_by_the_tensors(run, tmp_path, capsys, name):
    official = distinct(name)
    status, output = run(official)
    assert status == 0 and f"{config_path(name)} (by names and shapes" in output
    converted = len(official) - 53
    assert f"{len(official)} tensors read, {converted} converted" in output
    assert "53 of the file left out: counters of batch norms" in output
    assert torch.load(tmp_path / "out.pth")["class_names"] == list(NAMES)
    if name == "co_dino_r50":
        add_average(tmp_path / "out.pth")
    back = tmp_path / "back.pth"
    assert tool.main([str(tmp_path / "out.pth"), str(back), "--reverse"]) == 0
    output = capsys.readouterr().out
    assert "53 made anew" in output
    assert ("its averaged weights (EMA) are converted" in output) == (name == "co_dino_r50")
    assert same(torch.load(back)["state_dict"], official)
    assert torch.load(back)["meta"]["CLASSES"] == list(NAMES)


def test_the_number_of_classes_is_found(run):
    state = distinct("co_dino_r50")
    for key, value in state.items():
        if "cls_branches" in key or "label_embedding" in key or "atss_cls" in key:
            state[key] = value[:3]
        elif "fc_cls" in key:
            state[key] = value[:4]
        elif "fc_reg" in key:
            state[key] = value[:12]
    status, output = run(state, wrapper="model", prefix="")
    assert status == 0 and "model.num_classes=3 train.init_checkpoint=" in output


def test_the_second_set(run, tmp_path):
    plain = distinct("co_detr_r50")
    copies = {
        "ema_" + key.replace(".", "_"): value + 1 if value.is_floating_point() else value
        for key, value in plain.items()
    }
    config = ["--config-file", config_path("co_detr_r50")]
    embed = "query_head.transformer.level_embeds"
    status, output = run(plain | copies, *config)
    assert status == 0 and "676 of the file left out: the second set" in output
    assert torch.equal(
        torch.load(tmp_path / "out.pth")["model"]["encoder.level_embed"], plain[embed]
    )
    status, output = run(plain | copies, "--ema", *config)
    assert status == 0 and "676 of the file left out: the first set" in output
    found = torch.load(tmp_path / "out.pth")["model"]["encoder.level_embed"]
    assert torch.equal(found, plain[embed] + 1)


def test_errors_are_one_sentence_and_write_nothing(run, tmp_path):
    state = distinct("co_detr_r50")
    del state["neck.convs.0.gn.weight"]
    state["foo.bar"] = torch.zeros(1)
    status, output = run(state)
    assert status == 2 and "the nearest is co_detr_r50 (2 differences: unknown: foo.bar" in output
    status, output = run(state, "--config-file", config_path("co_detr_r50"))
    assert status == 2 and "foo.bar" in output and "lateral_convs.0.norm.weight" in output
    status, output = run(state, "--reverse")
    assert status == 2 and "leave --reverse out" in output
    assert output.count("\n") == 1
    assert not (tmp_path / "out.pth").exists()
    path = str(tmp_path / "in.pth")
    assert tool.main([path, path]) == 2
    assert tool.main([str(tmp_path / "nothing.pth"), path]) == 2
