"""Official checkpoints fill every parameter of ours, or are refused with the names."""

import json

import pytest
import torch
from detectron2.config import instantiate

from co_detr.checkpoint.official import (
    convert_official,
    is_official,
    official_state_dict,
    rename_official,
)
from co_detr.checkpoint.saving import Checkpointer
from co_detr.engine.config import load_config
from co_detr.errors import CheckpointError
from tests.modeling.builders import tiny_model
from tests.paths import ROOT, config_path

KEYS_FILE = ROOT / "tests" / "data" / "official_keys_co_deformable_detr_r50.json"


@pytest.fixture(scope="module")
def shapes():
    return json.loads(KEYS_FILE.read_text())


@pytest.fixture
def official(shapes):
    """A state dict of the full-size official model; its tensors have no memory behind them."""
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def full_model(name="co_detr_r50"):
    cfg = load_config(config_path(name))
    with torch.device("meta"):
        return instantiate(cfg.model)


def test_the_full_size_checkpoint_fits_exactly(official):
    model = full_model()
    conversion = convert_official(official, model)
    expected = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in conversion.state_dict.items()} == expected
    assert not conversion.unknown
    assert all(key.endswith("num_batches_tracked") for key in conversion.ignored)


def test_the_plain_detr_takes_its_part_of_the_checkpoint(official):
    model = full_model("deformable_detr_r50")
    conversion = convert_official(official, model)
    assert conversion.state_dict.keys() == model.state_dict().keys()
    prefixes = {key.split(".")[0] for key in conversion.ignored}
    assert prefixes == {"backbone", "query_head", "rpn_head", "roi_head", "bbox_head"}


def refusal(official, model):
    with pytest.raises(CheckpointError) as caught:
        convert_official(official, model)
    assert "\n" not in str(caught.value) and "Choose the config" in str(caught.value)
    return str(caught.value)


def test_a_missing_key(official):
    del official["query_head.cls_branches.2.bias"]
    message = refusal(official, full_model())
    assert "that the checkpoint lacks: decoder.class_heads.2.bias)" in message


def test_an_unknown_key(official):
    official["query_head.transformer.extra.weight"] = torch.empty(1, device="meta")
    message = refusal(official, full_model())
    assert "without a counterpart: query_head.transformer.extra.weight)" in message


def test_a_wrong_shape(official):
    official["neck.convs.1.conv.weight"] = torch.empty(256, 512, 1, 1, device="meta")
    message = refusal(official, full_model())
    assert "backbone.lateral_convs.1.weight is (256, 512, 1, 1) but the model has" in message


def test_another_number_of_classes_and_layers(official):
    message = refusal(official, tiny_model(2))
    assert "shapes that differ" in message and "and " in message and " more" in message


@pytest.mark.cpu_only("renames what was read from a file")
def test_official_anchors_loop_ratios_outside_of_sizes():
    """Three ratios and three sizes; Detectron2's index is size * 3 + ratio."""
    model = tiny_model(2)
    channels = 2
    objectness = torch.randn(9, channels, 1, 1)
    deltas, bias = torch.randn(9 * 4, channels, 1, 1), torch.randn(9 * 4)
    conversion = rename_official(
        {
            "rpn_head.rpn_cls.weight": objectness,
            "rpn_head.rpn_reg.weight": deltas,
            "rpn_head.rpn_reg.bias": bias,
        },
        model,
    )
    rpn = "auxiliary.heads.roi.rpn.rpn_head"
    ours = conversion.state_dict
    for size in range(3):
        for ratio in range(3):
            theirs, here = ratio * 3 + size, size * 3 + ratio
            found = ours[f"{rpn}.objectness_logits.weight"][here]
            assert torch.equal(found, objectness[theirs])
            for i in range(4):
                weight = ours[f"{rpn}.anchor_deltas.weight"][here * 4 + i]
                assert torch.equal(weight, deltas[theirs * 4 + i])
                assert ours[f"{rpn}.anchor_deltas.bias"][here * 4 + i] == bias[theirs * 4 + i]
    # Detectron2's generator does loop like that.
    generator = model.auxiliary.heads.roi.rpn.anchor_generator
    cells = generator.generate_cell_anchors(sizes=(8, 16, 32), aspect_ratios=(0.5, 1.0, 2.0))
    sides = cells[:, 2:] - cells[:, :2]
    torch.testing.assert_close(
        sides.prod(1).sqrt(), torch.tensor([8.0, 16, 32]).repeat_interleave(3)
    )
    torch.testing.assert_close(sides[:, 1] / sides[:, 0], torch.tensor([0.5, 1.0, 2.0]).repeat(3))


def test_the_table_of_head_embeddings_is_cut_by_head():
    key = "query_head.transformer.head_pos_embed.weight"
    converted = rename_official({key: torch.tensor([[1.5], [2.5]])}, tiny_model(2)).state_dict
    assert {key: value.tolist() for key, value in converted.items()} == {
        "auxiliary.positive_queries.roi.head_embedding": [1.5],
        "auxiliary.positive_queries.atss.head_embedding": [2.5],
    }


def test_wrappers_and_prefixes_are_removed():
    state = {"query_head.x": torch.zeros(1), "neck.y": torch.ones(1)}
    wrapped = {"state_dict": {f"module.{key}": value for key, value in state.items()}, "meta": 1}
    assert official_state_dict(wrapped, "x.pth") == official_state_dict(state, "x.pth") == state
    assert is_official(wrapped) and is_official(state)
    assert not is_official({"decoder.x": torch.zeros(1)})
    for nothing in ({}, {"state_dict": {"a": "b"}}):
        with pytest.raises(CheckpointError, match="holds no state dict"):
            official_state_dict(nothing, "x.pth")


def test_training_and_evaluation_load_an_official_file(shapes, tmp_path):
    # Every tensor is one number seen through strides of 0, so that the file stays small.
    state = {key: torch.tensor(0.5).expand(shape) for key, shape in shapes.items()}
    path = tmp_path / "official.pth"
    torch.save({"meta": {"epoch": 12}, "state_dict": state}, path)
    model = instantiate(load_config(config_path("deformable_detr_r50")).model)
    Checkpointer(model).load(str(path))
    assert all(bool((value == 0.5).all()) for value in model.state_dict().values())
