"""Checkpoints fit completely or are refused with the names of what does not fit."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from co_detr.checkpoint.saving import Checkpointer
from co_detr.errors import CheckpointError
from co_detr.modeling.backbones import SwinTransformer
from tests.engine.tiny_detector import TinyDetector

pytestmark = pytest.mark.cpu_only("files of weights; test_resume.py loads them on a device")


def _save(model, path, **changes):
    torch.save({"model": model.state_dict() | changes}, path)
    return str(path)


def _sentence(model, path, **settings):
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(model, **settings).load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_round_trip(tmp_path):
    model, other = TinyDetector(2), TinyDetector(2)
    Checkpointer(other).load(_save(model, tmp_path / "model.pth"))
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_other_number_of_classes(tmp_path):
    path = _save(TinyDetector(5), tmp_path / "model.pth")
    model = TinyDetector(2)
    before = model.classify.weight.clone()
    message = _sentence(model, path)
    assert "classify.weight is (5, 8) in the file but (2, 8) in the model" in message
    assert "classify.bias" in message and "model.num_classes" in message
    assert "train.init_checkpoint_mismatch=by_name" in message and "=reset" in message
    # ... which is the remedy for fine-tuning: the rest is loaded.
    Checkpointer(model, mismatch="reset").load(path)
    assert torch.equal(model.classify.weight, before)
    assert torch.equal(model.locate.weight, torch.load(path)["model"]["locate.weight"])


def test_missing_and_unknown_tensors(tmp_path):
    state = TinyDetector(2).state_dict()
    state["old.weight"] = state.pop("locate.bias")
    torch.save({"model": state}, tmp_path / "model.pth")
    message = _sentence(TinyDetector(2), str(tmp_path / "model.pth"))
    assert "locate.bias is not in the file" in message
    assert "old.weight is not in the model" in message


def test_missing_file_and_damaged_file(tmp_path):
    path = tmp_path / "model.pth"
    assert f"{path} does not exist" in _sentence(TinyDetector(2), str(path))
    _save(TinyDetector(2), path)
    path.write_bytes(path.read_bytes()[:1000])
    assert f"{path} cannot be read" in _sentence(TinyDetector(2), str(path))
    path.write_bytes(b"no checkpoint")
    assert f"{path} cannot be read" in _sentence(TinyDetector(2), str(path))
    torch.save({"model": 3}, path)
    assert "holds no state dict" in _sentence(TinyDetector(2), str(path))


def test_the_checkpointer_loads_again_after_a_failure(tmp_path):
    checkpointer = Checkpointer(TinyDetector(2))
    with pytest.raises(CheckpointError):
        checkpointer.load(_save(TinyDetector(3), tmp_path / "wrong.pth"))
    checkpointer.load(_save(TinyDetector(2), tmp_path / "right.pth"))


def test_half_precision_backbone_from_safetensors(tmp_path):
    source = TinyDetector(2).backbone.state_dict()
    save_file({key: value.half() for key, value in source.items()}, tmp_path / "b.safetensors")
    model = TinyDetector(2)
    head = model.locate.weight.clone()
    Checkpointer(model).load(str(tmp_path / "b.safetensors"))
    for key, value in model.backbone.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, source[key].half().float())
    assert torch.equal(model.locate.weight, head)


def test_backbone_below_a_channel_mapper(tmp_path):
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            inner = TinyDetector(2).backbone
            self.backbone = nn.ModuleDict({"bottom_up": inner, "lateral": nn.Linear(2, 2)})

    # nn.ModuleDict has no attributes of its members' names
    model = Mapped()
    model.backbone.bottom_up = model.backbone["bottom_up"]
    source = TinyDetector(2).backbone.state_dict()
    save_file(source, tmp_path / "b.safetensors")
    Checkpointer(model).load(str(tmp_path / "b.safetensors"))
    for key, value in model.backbone["bottom_up"].state_dict().items():
        assert torch.equal(value, source[key])


@pytest.mark.parametrize("change", ["unused", "missing", "shape"])
def test_every_tensor_of_a_backbone_file_must_be_used(tmp_path, change):
    source = TinyDetector(2).backbone.state_dict()
    if change == "unused":
        source["res3.weight"] = torch.zeros(3)
    elif change == "missing":
        del source["res2.bias"]
    else:
        source["res2.bias"] = torch.zeros(3)
    save_file(source, tmp_path / "b.safetensors")
    message = _sentence(TinyDetector(2), str(tmp_path / "b.safetensors"))
    expected = {
        "unused": "res3.weight is not in the backbone",
        "missing": "res2.bias is not in the file",
        "shape": "backbone.res2.bias is (3,) in the file but (8,) in the model",
    }
    assert expected[change] in message


def test_detectron2_pickle_of_a_classifier(tmp_path):
    """The layout of Detectron2's converted torchvision models: a backbone and an ImageNet head."""
    source = TinyDetector(2).backbone.state_dict()
    arrays = {key: value.numpy() for key, value in source.items()}
    arrays["stem.fc.weight"] = torch.zeros(1000, 8).numpy()
    content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R.pkl").write_bytes(pickle.dumps(content))
    model = TinyDetector(2)
    Checkpointer(model).load(str(tmp_path / "R.pkl"))
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, source[key])


def test_imagenet_file_of_swin(tmp_path):
    """The layout of the published classifiers: no output norms, but a head and masks."""
    numbers = dict(embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=4, drop_path_rate=0.0)
    model, source = TinyDetector(2), SwinTransformer(**numbers, out_features=["stage1"])
    model.backbone = SwinTransformer(**numbers, out_features=["stage1"])
    state = {key: value + 1 for key, value in source.state_dict().items()}
    norm = {key: state.pop(key) for key in list(state) if key.startswith("norm1.")}
    assert len(norm) == 2
    classifier = {"norm.weight": torch.ones(16), "head.weight": torch.ones(10, 16)}
    masks = {"layers.1.blocks.1.attn_mask": torch.zeros(4, 16, 16)}
    torch.save({"model": {**state, **classifier, **masks}}, tmp_path / "swin.pth")
    Checkpointer(model).load(str(tmp_path / "swin.pth"))
    loaded = model.backbone.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    assert torch.equal(loaded["norm1.weight"], torch.ones(16))
    del state["layers.0.blocks.0.mlp.fc1.weight"]
    torch.save({"model": state}, tmp_path / "swin.pth")
    message = _sentence(model, str(tmp_path / "swin.pth"))
    assert "layers.0.blocks.0.mlp.fc1.weight is not in the file" in message


def test_a_failing_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    checkpointer = Checkpointer(TinyDetector(2), str(tmp_path))
    checkpointer.save("model_final")
    before = (tmp_path / "model_final.pth").read_bytes()

    def fail(data, file):
        file.write(b"half of a file")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    for name in ("model_final", "model_0000009"):
        with pytest.raises(CheckpointError, match=rf"{name}\.pth cannot be written \(disk full\)"):
            checkpointer.save(name)
    assert (tmp_path / "model_final.pth").read_bytes() == before
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_final.pth")
    assert not (tmp_path / "model_0000009.pth").exists()


def test_a_failing_save_is_told_where_the_mark_cannot_be_read_either(tmp_path, monkeypatch):
    checkpointer = Checkpointer(TinyDetector(2), str(tmp_path))
    (tmp_path / "last_checkpoint").mkdir()

    def fail(data, file):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(CheckpointError, match=r"\(disk full\); there is no earlier one"):
        checkpointer.save("model_final")
