"""Files that are malicious, damaged or somebody else's: a clear sentence, and nothing is run."""

import os
import pickle
from collections import OrderedDict
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from co_detr.checkpoint.reading import read_checkpoint
from co_detr.checkpoint.saving import Checkpointer
from co_detr.errors import CheckpointError
from tests.checkpoint.official import distinct
from tests.modeling.builders import tiny_model


class Hostile:
    """A pickle of it makes a file when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def sentence(path, **settings):
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(tiny_model(2), **settings).load(str(path))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500
    return message


def write(content, path, kind):
    if kind == "zip":
        torch.save(content, path)
    elif kind == "legacy":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(content, protocol=int(kind)))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("suffix", "kind"),
    [(".pth", "zip"), (".pth", "legacy"), (".pth", "4"), (".pkl", "4"), (".pkl", "0")],
)
def test_a_malicious_checkpoint_is_refused(tmp_path, suffix, kind):
    trace, path = tmp_path / "trace", tmp_path / f"model{suffix}"
    state = {"encoder.level_embed": torch.zeros(2) if kind in ("zip", "legacy") else np.zeros(2)}
    write({"model": state, "__author__": "x", "more": Hostile(trace)}, path, kind)
    message = sentence(path)
    assert f"{path} was refused because it refers to" in message and "mkdir" in message
    assert "train.init_checkpoint_unsafe=true" in message
    assert not trace.exists()
    # It is the switch that keeps it from running; what a bare pickle named .pth holds is lost then.
    with nullcontext() if (suffix, kind) != (".pth", "4") else pytest.raises(CheckpointError):
        read_checkpoint(str(path), unsafe=True)
    assert trace.exists()


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint(tmp_path, kind, part):
    path = tmp_path / "model.pth"
    write({"model": {"a": torch.zeros(5000)}}, path, kind)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    message = sentence(path)
    assert f"{path} cannot be read" in message and "fetch or write it again" in message


def test_a_text_file(tmp_path):
    for suffix in (".pth", ".pkl", ".safetensors"):
        path = tmp_path / f"model{suffix}"
        path.write_text("version https://git-lfs.github.com/spec/v1")
        assert f"{path} cannot be read" in sentence(path)
    assert "begins with b'version https" in sentence(tmp_path / "model.pth")


def test_another_architecture(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"state_dict": {"rpn_head.a": torch.zeros(1), "backbone.b": torch.zeros(1)}}, path)
    assert "does not fit the model (backbone.b is not in the backbone" in sentence(path)
    torch.save({"model": tiny_model(0).state_dict()}, path)
    assert "auxiliary.pyramid.conv.weight is not in the file" in sentence(path)
    state = {"query_head.transformer.other": torch.zeros(1)}
    torch.save({"state_dict": state}, path)
    assert "counterpart: query_head.transformer.other" in sentence(path)
    for mismatch in ("by_name", "reset"):
        message = sentence(path, mismatch=mismatch, class_names=["a"])
        assert "not" in message and ("names of its classes" in message or "fits" in message)


def test_other_shapes(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"state_dict": distinct("co_detr_r50")}, path)
    message = sentence(path)
    assert "shapes that differ" in message and "Choose the config" in message
    torch.save({"model": tiny_model(2, ["model.encoder.embed_dim=64"]).state_dict()}, path)
    assert "in the file but" in sentence(path)


@pytest.mark.parametrize("content", [{}, [1], {"model": 3}, {"model": {"epoch": 3}}])
def test_no_state_dict(tmp_path, content):
    path = tmp_path / "model.pth"
    torch.save(content, path)
    assert "holds no state dict" in sentence(path)


def test_harmless_company_of_tensors_is_read(tmp_path):
    """What mmcv writes beside the weights: strings, tuples, numbers of numpy."""
    meta = {"CLASSES": ("a", "b"), "best": np.float64(0.5), "epoch": np.int64(3), "iter": 4}
    meta |= {"hook_msgs": OrderedDict(score=np.float32(2)), "curve": np.arange(3.0)}
    before = torch.serialization.get_safe_globals()
    for kind in ("zip", "legacy"):
        write({"state_dict": OrderedDict(a=torch.ones(1)), "meta": meta}, tmp_path / "m.pth", kind)
        found = read_checkpoint(str(tmp_path / "m.pth"))["meta"]
        assert found["best"] == 0.5 and found["curve"].tolist() == [0, 1, 2]
    assert set(torch.serialization.get_safe_globals()) == set(before)


@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_pickles_of_both_numpy_generations(tmp_path, module):
    content = pickle.dumps({"w": np.arange(3.0), "w_momentum": np.zeros(1)}, protocol=0)
    name = np.zeros(1).__reduce__()[0].__module__.encode()
    (tmp_path / "R.pkl").write_bytes(content.replace(name, module))
    found = read_checkpoint(str(tmp_path / "R.pkl"))
    assert found["__author__"] == "Caffe2" and list(found["model"]) == ["w"]
    assert found["model"]["w"].tolist() == [0, 1, 2]


def test_safetensors_and_pycls(tmp_path):
    save_file({"a": torch.ones(2).half()}, tmp_path / "a.safetensors")
    assert read_checkpoint(str(tmp_path / "a.safetensors"))["model"]["a"].dtype == torch.float32
    torch.save({"model_state": {"a": torch.ones(1)}}, tmp_path / "a.pyth")
    assert read_checkpoint(str(tmp_path / "a.pyth"))["__author__"] == "pycls"
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pyth")
    with pytest.raises(CheckpointError, match="model_state"):
        read_checkpoint(str(tmp_path / "a.pyth"))
