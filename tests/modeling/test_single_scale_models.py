"""Whole single-scale models: a training step, groups, stripping, and learning two images."""

import numpy as np
import pytest
import torch
from detectron2.config import instantiate

from co_detr.engine.config import load_config
from co_detr.structures import QuerySet
from co_detr.tools.digits import DigitsConfig, SceneConfig, draw_scene, load_glyphs, load_photograph
from tests.device import DEVICE
from tests.modeling.builders import (
    BASELINES,
    NUM_CLASSES,
    assert_complete,
    detect,
    make_batch,
    make_candidates,
    make_instances,
    randomize,
    shrink,
    train_step,
)
from tests.paths import config_path

KINDS = ["conditional", "dab"]


def load(name, *overrides):
    return load_config(config_path(name), overrides)


def build(kind, *overrides, seed=0):
    """Co-Conditional-DETR or Co-DAB-DETR at test size."""
    overrides = [f"model.num_classes={NUM_CLASSES}", *overrides]
    cfg = shrink(load(f"co_{kind}_detr_r50", *overrides))
    torch.manual_seed(seed)
    return instantiate(cfg.model).to(DEVICE)


def test_published_recipe():
    conditional, dab = (load(f"{kind}_detr_r50") for kind in KINDS)
    for cfg in (conditional, dab):
        assert (cfg.optimizer.lr, cfg.optimizer.weight_decay) == (1e-4, 1e-4)
        assert cfg.optimizer.params.lr_factor_func.factor == 0.1  # of the backbone
        assert cfg.train.clip_grad.max_norm == 0.1
        assert cfg.train.max_iter == 50 * 7500 and cfg.train.effective_batch_size == 16
        assert list(cfg.lr_multiplier.drops) == [40 / 50]
        assert (cfg.model.assigner.class_weight, cfg.model.queries.matching.num_queries) == (
            2.0,
            300,
        )
    assert (conditional.model.encoder.dropout, dab.model.encoder.dropout) == (0.1, 0.0)
    assert (conditional.model.criterion.class_weight, dab.model.criterion.class_weight) == (2, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("padding", "num_gts"), [("negatives", (3, 2)), ("mask", (0, 3))])
def test_a_training_step_is_complete(kind, padding, num_gts):
    model = build(kind, f"model.auxiliary.positive_queries.padding={padding}")
    losses = train_step(model, make_batch(((67, 97), (65, 89)), num_gts))
    assert_complete(model, losses)
    groups = {"matching", "roi_queries", "atss_queries"}
    assert {name.split(".")[0] for name in losses} == groups | {"roi", "atss"}
    assert {f"{group}.d0.loss_giou" for group in groups} <= set(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_no_ground_truth_at_all_in_half_precision(kind):
    model = build(kind, "model.auxiliary.positive_queries.padding=mask")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = train_step(model, make_batch(((96, 96), (80, 96)), num_gts=(0, 0)))
    assert_complete(model, losses)
    assert all(value.dtype == torch.float32 for value in losses.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", ["negatives", "mask"])
def test_matched_queries_do_not_see_positive_queries(kind, padding):
    node = "model.auxiliary.positive_queries"
    model = build(kind, f"{node}.padding={padding}", "model.encoder.dropout=0.0").double()
    randomize(model)
    memory = model.encode(model.preprocess(make_batch(((64, 96), (40, 64)))))
    groups = [model.queries["matching"](memory)]
    for seed, (name, source) in enumerate(model.auxiliary.positive_queries.items()):
        candidates, _ = make_candidates((5 + 8 * seed, 12), (20, 20), seed=seed)
        groups.append(source(name, candidates, memory.geometry))
    assert any(group.valid is not None for group in groups) == (padding == "mask")
    together = QuerySet.concat(groups)
    joint = together.split(model.decoder(together, memory))
    for group, actual in zip(groups, joint, strict=True):
        expected = model.decoder(QuerySet.concat([group]), memory)
        torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-11)
        torch.testing.assert_close(actual.boxes, expected.boxes, rtol=0, atol=1e-11)
    open_to_all = QuerySet(
        together.content, together.position, together.reference, None, together.sizes
    )
    mixed = together.split(model.decoder(open_to_all, memory))[0]
    assert (mixed.logits - joint[0].logits).abs().max() > 1e-3  # the mask is what hides them


@pytest.mark.parametrize("kind", KINDS)
def test_stripping_leaves_detections_and_the_plain_model(kind):
    model = build(kind)
    randomize(model)
    batch = make_batch()
    before = detect(model, batch)
    model.strip_auxiliary()
    cfg = shrink(load(f"{kind}_detr_r50", f"model.num_classes={NUM_CLASSES}"))
    plain = instantiate(cfg.model).to(DEVICE)
    plain.load_state_dict(model.state_dict())
    for found in (detect(model, batch), detect(plain, batch)):
        for one, other in zip(found, before, strict=True):
            assert torch.equal(one.scores, other.scores)
            assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)


def test_there_is_a_small_one_of_each_kind():
    assert {f"co_{kind}_detr_small" for kind in KINDS} <= set(BASELINES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overrides", [[], ["model.auxiliary=null"]])
def test_small_models(kind, overrides):
    cfg = load(f"co_{kind}_detr_small", *overrides)
    model = instantiate(cfg.model).to(DEVICE)
    batch = make_batch(((128, 160),), num_gts=(2,))  # 80 tokens for 60 queries
    losses = train_step(model, batch)
    assert_complete(model, losses)
    prefixes = {name.split(".")[0] for name in losses}
    if overrides:
        assert prefixes == {"matching"}
        return
    assert prefixes == {"matching", "roi_queries", "atss_queries", "roi", "atss"}
    assert model.auxiliary.pyramid.names == model.auxiliary.heads.atss.in_features
    assert model.auxiliary.loss_weight == 2.0 * model.decoder.num_layers == 6.0


@pytest.fixture(scope="module")
def two_digit_images():
    """Inputs of two generated images of digits."""
    digits = DigitsConfig()
    glyphs, photograph = (
        load_glyphs(digits)["train"],
        load_photograph("sklearn/datasets/images/china.jpg"),
    )
    scene_config = SceneConfig(image_side=(80, 96), digits=(2, 3))
    batch = []
    for seed in range(2):
        scene = draw_scene(glyphs, [photograph], scene_config, np.random.default_rng(seed))
        size = scene.pixels.shape[:2]
        boxes = torch.tensor([digit.box for digit in scene.digits], dtype=torch.float32)
        classes = torch.tensor([digit.glyph.label % NUM_CLASSES for digit in scene.digits])
        image = torch.from_numpy(scene.pixels.copy()).permute(2, 0, 1)
        batch.append({"image": image, "instances": make_instances(boxes, classes, size)})
    return batch


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_images_are_learned(kind, two_digit_images):
    model = build(kind, "model.encoder.dropout=0.0")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    totals = []
    for _ in range(30):
        losses = train_step(model, two_digit_images)
        totals.append({key: value.item() for key, value in losses.items()})
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def loss(step, prefix):
        return sum(value for key, value in totals[step].items() if key.startswith(prefix))

    # Not "roi_queries.", which become more as the region proposals get better.
    for group in ("matching.", "atss_queries.", ""):
        assert loss(-1, group) < 0.8 * loss(0, group), group
