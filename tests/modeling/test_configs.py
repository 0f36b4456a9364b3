"""Every experiment of configs/ builds; one of every family trains a step and detects."""

from functools import cache

import pytest
import torch
from detectron2.config import LazyCall, instantiate
from omegaconf import OmegaConf
from torch import nn

from co_detr.engine.config import load_config
from co_detr.modeling import TopKPostprocessor
from co_detr.modeling.auxiliary import DenseHead, SimplePyramid
from co_detr.modeling.single_scale import ConditionalDecoder, DABDecoder
from tests.device import DEVICE
from tests.modeling.builders import (
    EXPERIMENTS,
    NUM_CLASSES,
    NUM_QUERIES,
    assert_complete,
    detect,
    make_batch,
    randomize,
    shrink,
    train_step,
    with_masks,
)
from tests.paths import config_path

ALL_HEADS = ["roi", "atss", "retinanet", "fcos", "paa", "gfl"]
HEADS = {  # all others: roi and atss
    "deformable_detr_r50": [],
    "conditional_detr_r50": [],
    "dab_detr_r50": [],
    "co_detr_r50_atss": ["atss"],
    "co_detr_r50_k6": ALL_HEADS,
    "quickstart_k6": ALL_HEADS,
}
# One experiment of every family; the others differ from one of these in numbers only.
MEMBERS = [
    "deformable_detr_r50",
    "conditional_detr_r50",
    "dab_detr_r50",
    "co_conditional_detr_r50",
    "co_dab_detr_r50",
    "co_detr_r50_atss",
    "co_detr_r50",
    "co_detr_r50_mask_rcnn",
    "co_detr_small",
    "co_detr_r50_k6",
    "co_detr_thin_r50",
    "quickstart",
    "quickstart_k6",
    "quickstart_co_dino",
    "co_deformable_detr_swin_t_12ep",
    "co_detr_convnext_t",
    "co_dino_r50",
    "co_dino_r50_9enc_lsj_12ep",
    "co_dino_swin_l_12ep",
    "co_dino_swin_l_lsj_12ep",
    "co_dino_vit_l_o365_12ep",
    "co_dino_vit_l_o365_lsj_lvis_16ep",
]


def load(name, *overrides):
    return load_config(config_path(name), overrides)


@cache
def full_size(name):
    """The model of a config, for three classes, to be looked at only: shapes without memory."""
    with torch.device("meta"):
        return instantiate(load(name, "model.num_classes=3").model)


def heads_of(model):
    return [] if model.auxiliary is None else list(model.auxiliary.heads)


def test_there_are_experiments():
    assert {"co_detr_r50", "co_detr_r50_atss", "deformable_detr_r50", "quickstart"} <= set(
        EXPERIMENTS
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_full_size_model(name):
    model = full_size(name)
    assert heads_of(model) == HEADS.get(name, ["roi", "atss"])
    levels = model.backbone.output_shape()
    assert len(levels) == model.encoder.num_levels
    if model.auxiliary is not None:
        if isinstance(model.auxiliary.pyramid, SimplePyramid):
            strides, names = [8, 16, 32, 64, 128], model.auxiliary.pyramid.names
        else:
            # The heads read the encoder's levels, at their strides, and one more.
            strides = [shape.stride for shape in levels.values()]
            strides.append(2 * strides[-1])
            names = [*levels, f"p{strides[-1].bit_length() - 1}"]
        atss = model.auxiliary.heads.atss
        for head in model.auxiliary.heads.values():
            if isinstance(head, DenseHead):
                assert head.strides == strides
                assert head.in_features == names
        assert model.auxiliary.loss_weight == 2.0 * model.decoder.num_layers
    if "roi" in heads_of(model):
        roi = model.auxiliary.heads.roi
        assert roi.rpn.anchor_generator.strides == strides
        assert roi.rpn.in_features == atss.in_features
        pooled = roi.roi_heads.box_in_features
        assert pooled == atss.in_features[: len(pooled)]
        scales = [pooler.spatial_scale for pooler in roi.roi_heads.box_pooler.level_poolers]
        assert scales == [1 / stride for stride in strides[: len(pooled)]]


def wrapper(detector):
    return detector


@pytest.mark.slow
@pytest.mark.parametrize(
    "mount",
    [
        lambda model: {"detector": model},
        lambda model: {"model": LazyCall(wrapper)(detector=model)},
        lambda model: {"model": {"num_classes": 3}, "teacher": model},
    ],
    ids=["under-another-key", "wrapped", "beside-another"],
)
@pytest.mark.parametrize("name", ["co_detr_r50_k6", "co_dino_r50_instance", "co_dab_detr_r50"])
def test_a_model_is_complete_wherever_it_is_mounted(name, mount):
    model = load(name, "model.encoder.embed_dim=128", "model.num_classes=7").model
    mounted = OmegaConf.create(mount(model), flags={"allow_objects": True})
    with torch.device("meta"):
        found = instantiate(mounted[list(mounted)[-1]])
        expected = instantiate(model)
    shapes = {key: tensor.shape for key, tensor in expected.state_dict().items()}
    assert {key: tensor.shape for key, tensor in found.state_dict().items()} == shapes


def test_the_reference_recipe():
    cfg = load("co_detr_r50")
    assert (cfg.train.max_iter, cfg.train.effective_batch_size) == (90000, 16)
    assert (cfg.optimizer.lr, cfg.optimizer.weight_decay) == (2e-4, 1e-4)
    assert cfg.train.clip_grad.max_norm == 0.1
    model = cfg.model
    assert (model.queries["matching"].num_queries, model.postprocessor.max_detections) == (300, 100)
    assert (model.encoder.num_layers, model.decoder.num_layers) == (6, 6)


def family(name):
    """What decides which code runs, sizes apart."""
    model = load(name).model
    heads = [] if model.auxiliary is None else sorted(model.auxiliary)
    return (
        model.backbone.bottom_up._target_,
        len(model.backbone.get("in_features", [])),
        model.encoder.get("num_levels"),
        model.decoder._target_,
        model.queries.matching._target_,
        list(model.queries),
        model.postprocessor._target_,
        "padding" in model,
        "roi" in heads and bool(model.auxiliary.roi.roi_heads.box_head.conv_dims),
        "roi" in heads and "mask_head" in model.auxiliary.roi.roi_heads,
        heads,
    )


@pytest.mark.slow
def test_every_family_has_a_member():
    families = {name: family(name) for name in EXPERIMENTS}
    covered = [families[name] for name in MEMBERS]
    assert [name for name, kind in families.items() if kind not in covered] == []


@pytest.mark.parametrize("name", MEMBERS)
def test_one_step_and_one_detection(name):
    cfg = shrink(load(name, f"model.num_classes={NUM_CLASSES}"))
    torch.manual_seed(0)
    model = instantiate(cfg.model).to(DEVICE)
    randomize(model)  # a layer that starts at zero keeps gradients from the ones before it
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    before = {key: value.clone() for key, value in model.named_parameters()}
    batch = with_masks(make_batch())  # most heads do not look at them
    assert_complete(model, train_step(model, batch))
    optimizer.step()
    still = [key for key, value in model.named_parameters() if torch.equal(value, before[key])]
    # Dense heads have a scale per level, and none learns where no anchor is positive.
    idle = [".scales."]
    if model.auxiliary is None and isinstance(model.decoder, (ConditionalDecoder, DABDecoder)):
        # The first layer's queries have no content, which positive queries would have.
        first = "decoder.layers.0.self_attention"
        idle += [f"{first}.{part}.weight" for part in ("query_content", "key_content", "value")]
    assert not [key for key in still if not any(part in key for part in idle)]
    for found, sample in zip(detect(model, batch), batch, strict=True):
        assert found.image_size == (sample["height"], sample["width"])
        if isinstance(model.postprocessor, TopKPostprocessor):
            assert len(found) == min(model.postprocessor.max_detections, NUM_QUERIES * NUM_CLASSES)
        assert 0 < len(found) <= NUM_QUERIES * NUM_CLASSES
        assert found.scores.isfinite().all() and (found.pred_classes < NUM_CLASSES).all()


@pytest.mark.parametrize(
    ("name", "epochs", "drops"),
    [
        ("co_deformable_detr_swin_s_36ep", 36, [30]),
        ("co_dino_swin_l_24ep", 24, [20]),
        ("co_dino_swin_l_o365_16ep", 16, [8]),
        ("co_dino_vit_l_o365_12ep", 12, [7]),
        ("co_dino_vit_l_o365_lsj_lvis_16ep", 16, [9, 15]),
    ],
)
def test_schedules(name, epochs, drops):
    cfg = load(name)
    per_epoch = cfg.train.max_iter / epochs
    assert per_epoch in (7500, 6261) and cfg.train.eval_period == per_epoch
    schedule = instantiate(cfg.lr_multiplier)

    def rate(iteration):
        return schedule(iteration / cfg.train.max_iter)

    assert rate(0) == pytest.approx(0.01 if "vit" in name else 1.0)
    assert rate(500) == 1.0
    for count, drop in enumerate(drops):
        assert rate(drop * per_epoch - 1) == pytest.approx(0.1**count)
        assert rate(drop * per_epoch) == pytest.approx(0.1 ** (count + 1))


def test_layer_wise_learning_rates_of_vit():
    cfg = load("co_dino_vit_l_o365_12ep")
    with torch.device("meta"):
        cfg.optimizer.params.model = instantiate(cfg.model)
    names = {id(p): name for name, p in cfg.optimizer.params.model.named_parameters()}
    groups = instantiate(cfg.optimizer).param_groups
    settings = {names[id(p)]: group for group in groups for p in group["params"]}
    bottom_up = "backbone.bottom_up"
    for name, power in (
        (f"{bottom_up}.patch_embed.proj.weight", 25),
        (f"{bottom_up}.blocks.0.attn.q_proj.weight", 24),
        (f"{bottom_up}.blocks.23.attn.q_proj.weight", 1),
        ("encoder.layers.0.ffn_norm.weight", 0),
    ):
        assert settings[name]["lr"] == pytest.approx(5e-5 * 0.8**power)
        # As the reference's optimizer does: no decay of norms and biases.
        assert settings[name]["weight_decay"] == (0.0 if "norm" in name else 0.01)


def test_heads_can_be_switched_off_from_the_command_line():
    for name in ("quickstart", "co_detr_r50"):
        model = instantiate(shrink(load(name, "model.auxiliary=null")).model).to(DEVICE)
        assert model.auxiliary is None
        assert all(key.startswith("matching.") for key in train_step(model, make_batch()))


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMBERS)
def test_number_of_classes_reaches_every_part(name):
    model = full_size(name)
    counted = [module for module in model.modules() if hasattr(module, "num_classes")]
    # A backbone's own number is that of a classifier.
    counted = [module for module in counted if module not in set(model.backbone.modules())]
    assert {module.num_classes for module in counted} == {3}
    class_heads = [*model.decoder.class_heads]
    if hasattr(model.queries["matching"], "class_head"):
        class_heads.append(model.queries["matching"].class_head)
    assert all(isinstance(head, nn.Linear) and head.out_features == 3 for head in class_heads)
    if "atss" in heads_of(model):
        assert model.auxiliary.heads.atss.class_logits.out_channels == 3
    if "roi" in heads_of(model):
        predictor = model.auxiliary.heads.roi.roi_heads.box_predictor
        agnostic = load(name).model.auxiliary.roi.roi_heads.box_predictor.get(
            "cls_agnostic_bbox_reg"
        )
        assert predictor.cls_score.out_features == 4
        assert predictor.bbox_pred.out_features == (4 if agnostic else 12)


def test_overrides_reach_data_and_loss_weights(rectangles):
    overrides = [
        "train.effective_batch_size=4",
        "model.auxiliary.lambda_2=3.0",
        "model.criterion.class_weight=4.0",
        "model.queries.matching.num_queries=12",
        "model.auxiliary.atss.assigner.topk=5",
    ]
    cfg = load("co_detr_r50", *rectangles, *overrides)
    cfg.dataloader.train.num_workers = 0
    batch = next(iter(instantiate(cfg.dataloader.train)))
    assert len(batch) == 4
    assert {int(c) for sample in batch for c in sample["instances"].gt_classes} <= {0, 1, 2}
    assert len(instantiate(cfg.dataloader.test).dataset) == 4
    with torch.device("meta"):
        model = instantiate(cfg.model)
    assert model.auxiliary.loss_weight == 18.0
    assert model.criterion.class_weight == 4.0
    assert model.queries["matching"].content.weight.shape[0] == 12
    assert model.auxiliary.heads.atss.assigner.topk == 5
