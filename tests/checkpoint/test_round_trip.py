"""Official -> ours -> official, and ours -> official -> ours, are identities."""

import pytest
import torch

from co_detr.checkpoint.official import convert_official, official_state_dict, restore_official
from co_detr.checkpoint.official_table import DroppedRow, Row
from co_detr.errors import CheckpointError
from tests.checkpoint.official import KEYS, distinct, empty_model, same, shapes


@pytest.mark.parametrize("name", KEYS)
def test_both_ways_are_identities(name):
    official, model = distinct(name), empty_model(name)
    conversion = convert_official(official, model)
    ours = conversion.state_dict
    expected = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in ours.items()} == expected
    back = restore_official(ours, model)
    assert same(back.state_dict, official)
    assert set(back.restored) == conversion.ignored.keys() and not back.absent
    assert same(convert_official(back.state_dict, model).state_dict, ours)


def test_names_of_the_model_with_masks_for_lvis():
    """Those of COCO, and the rotary tables of whole maps, which square images have."""
    model = empty_model("co_dino_vit_l_o365_lsj_lvis_instance_16ep")
    found = restore_official(model.state_dict(), model).state_dict.keys()
    coco = shapes("co_dino_vit_l_o365_instance_12ep").keys()
    tables = {key for key in found - coco if ".attn.rope.freqs_" in key}
    heads = "roi_head.0.bbox_head.shared_"
    assert {key for key in coco - found if not key.startswith(f"{heads}convs.")} == set()
    assert found - coco - tables == {
        *(f"backbone.rope_glb.freqs_{part}" for part in ("cos", "sin")),
        *(f"{heads}fcs.1.{leaf}" for leaf in ("weight", "bias")),
    }
    assert len(tables) == 2 * 6 and len(found) == 965


def test_counters_come_back_as_integer_zeros():
    model = empty_model("co_detr_r50")
    ours = convert_official(distinct("co_detr_r50"), model).state_dict
    counter = restore_official(ours, model).state_dict["backbone.bn1.num_batches_tracked"]
    assert counter.dtype == torch.int64 and counter.shape == () and counter == 0


def test_the_plain_detr_says_what_cannot_come_back():
    model = empty_model("deformable_detr_r50")
    official = distinct("co_detr_r50")
    back = restore_official(convert_official(official, model).state_dict, model)
    assert back.absent == ["auxiliary heads, which this model does without"]
    assert all(torch.equal(value, official[key]) for key, value in back.state_dict.items())


@pytest.mark.parametrize("name", KEYS)
def test_without_aux_and_denoising_the_rest_converts(name):
    model = empty_model(name)
    ours = convert_official(distinct(name), model)
    model.strip_auxiliary()
    stripped = convert_official(distinct(name), model)
    assert stripped.state_dict.keys() == model.state_dict().keys()
    assert all(
        torch.equal(stripped.state_dict[key], ours.state_dict[key]) for key in model.state_dict()
    )
    assert len(stripped.ignored) > len(ours.ignored)


def test_an_incomplete_state_is_not_restored():
    model = empty_model("co_detr_r50")
    ours = convert_official(distinct("co_detr_r50"), model).state_dict
    del ours["encoder.level_embed"]
    ours["other"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        restore_official(ours, model)
    assert "lacks: encoder.level_embed" in str(caught.value)
    assert "without an official counterpart: other" in str(caught.value)


def test_the_second_set_of_weights():
    plain = {"query_head.a.weight": torch.zeros(2), "backbone.b": torch.zeros(3)}
    copies = {"ema_query_head_a_weight": torch.ones(2)}
    state = {"module." + key: value for key, value in (plain | copies).items()}
    # A buffer without a copy keeps its plain tensor.
    second = official_state_dict({"state_dict": state}, "x.pth", ema=True)
    assert same(second, {"query_head.a.weight": torch.ones(2), "backbone.b": torch.zeros(3)})
    assert official_state_dict({"model": state}, "x.pth").keys() == (plain | copies).keys()
    with pytest.raises(CheckpointError, match="has none"):
        official_state_dict(plain, "x.pth", ema=True)
    with pytest.raises(CheckpointError, match="ema_stranger without a plain tensor"):
        official_state_dict(plain | {"ema_stranger": torch.zeros(1)}, "x.pth", ema=True)


def test_copies_are_left_out_and_counted():
    model, official = empty_model("co_detr_r50"), distinct("co_detr_r50")
    copies = {"ema_" + key.replace(".", "_"): value for key, value in official.items()}
    conversion = convert_official(official | copies, model)
    assert len(conversion.ignored) == len(copies) + 53


def test_a_tensor_that_cannot_be_taken_apart_is_named():
    official = distinct("co_detr_r50")
    official["rpn_head.rpn_cls.weight"] = torch.zeros(8, 256, 1, 1)
    official["query_head.transformer.head_pos_embed.weight"] = torch.zeros(3, 1)
    with pytest.raises(CheckpointError) as caught:
        convert_official(official, empty_model("co_detr_r50"))
    assert "rpn_head.rpn_cls.weight of shape (8, 256, 1, 1)" in str(caught.value)
    assert "head_pos_embed.weight of shape (3, 1)" in str(caught.value)


def test_a_rewrite_needs_its_inverse():
    with pytest.raises(ValueError, match="both rewrite and restore"):
        Row("a", "b", rewrite=torch.neg)
    with pytest.raises(ValueError, match="both beside and restore"):
        DroppedRow("a", "no use", beside="b")
