"""The baselines of configs/baselines: what they compute beside the plain model, and what stays."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import instantiate

from co_detr.checkpoint.detector import Detector, load_detector
from co_detr.engine.config import apply_overrides, load_config
from co_detr.errors import ConfigError
from co_detr.modeling.transformer import inverse_sigmoid
from co_detr.structures import QuerySet
from co_detr.tools.export.exporting import ExportSettings, export_detector
from tests.device import DEVICE
from tests.modeling.builders import (
    BASELINES,
    NUM_CLASSES,
    NUM_EXTRA,
    NUM_QUERIES,
    assert_complete,
    detect,
    is_inside,
    make_batch,
    make_candidates,
    randomize,
    shrink,
    tiny_model,
    train_step,
)
from tests.paths import config_path

ON_ENCODER = {"atss": "atss_on_encoder_r50", "roi": "faster_rcnn_on_encoder_r50"}


def build(name, *overrides, seed=0):
    cfg = shrink(load_config(config_path(name)))
    apply_overrides(cfg, [f"model.num_classes={NUM_CLASSES}", *overrides])
    torch.manual_seed(seed)
    return instantiate(cfg.model).to(DEVICE)


def copy_shared(target, source):
    """Gives `target` all weights of `source` that it has, too; returns how many."""
    own, theirs = target.state_dict(), source.state_dict()
    shared = {name: value for name, value in theirs.items() if name in own}
    target.load_state_dict(shared, strict=False)
    return len(shared)


def output_of(model, batch):
    """The complete `TrainingOutput` of a step in float64."""
    model.train().double()
    images = model.preprocess(batch)
    return model.forward_training(images, [sample["instances"] for sample in batch])


@pytest.mark.slow
@pytest.mark.parametrize("name", BASELINES)
def test_full_size_model(name):
    cfg = load_config(config_path(name))
    assert cfg.train.output_dir == f"output/{name}"
    with torch.device("meta"):
        instantiate(cfg.model)


@pytest.mark.parametrize("name", [name for name in BASELINES if name.endswith("_r50")])
@pytest.mark.parametrize("num_gts", [(3, 2), (0, 2), (0, 0)])
def test_a_step_trains_everything(name, num_gts):
    model = build(name)
    assert_complete(model, train_step(model, make_batch(num_gts=num_gts)))
    for found in detect(model, make_batch()):
        assert len(found) and is_inside(found)


# --- hybrid matching


def test_hybrid_matching_repeats_every_ground_truth():
    model = build("h_deformable_detr_r50")
    randomize(model)
    batch = make_batch()
    output = output_of(model, batch)
    assert [group.name for group in output.groups] == ["matching", "one_to_many"]
    assert [group.num_queries for group in output.groups] == [NUM_QUERIES, NUM_EXTRA]
    for targets, repeats in zip(output.targets, (1, 6), strict=True):
        for image, sample in enumerate(batch):
            truth = sample["instances"].gt_classes.to(DEVICE)
            for labels in targets.labels[:, image]:
                found = labels[labels < NUM_CLASSES]
                expected = torch.bincount(truth, minlength=NUM_CLASSES) * repeats
                assert torch.equal(torch.bincount(found, minlength=NUM_CLASSES), expected)


def test_ranks_are_dealt_out_between_the_groups():
    model = build("h_deformable_detr_r50").double()
    randomize(model)
    memory = model.encode(model.preprocess(make_batch()))
    source = model.queries["matching"]
    first, second = source.training_groups(memory, [])
    both = copy.deepcopy(source)
    both.num_queries = NUM_QUERIES + NUM_EXTRA
    both.content = torch.nn.Embedding(both.num_queries, 32).double()
    reference = torch.cat([first.reference, second.reference], dim=1)
    assert torch.equal(reference, both(memory).reference)
    assert not reference.requires_grad


def test_more_repeats_than_queries_leave_none_over():
    model = build("h_deformable_detr_r50", "model.queries.matching.repeats=30")
    output = output_of(model, make_batch(num_gts=(3, 1)))
    positives = (output.targets[1].labels < NUM_CLASSES).sum(-1)
    assert positives.tolist() == [[NUM_EXTRA, 30]] * 2


def test_one_to_many_queries_are_for_training_alone():
    hybrid, plain, batch = build("h_deformable_detr_r50"), tiny_model(0, seed=1), make_batch()
    randomize(hybrid)
    before = detect(hybrid, batch)
    assert copy_shared(plain, hybrid) == len(plain.state_dict())
    both = output_of(copy.deepcopy(hybrid), batch), output_of(copy.deepcopy(plain), batch)
    matching = {name: value for name, value in both[0].losses.items() if "one_to_many" not in name}
    assert matching.keys() == both[1].losses.keys()
    for name, value in both[1].losses.items():
        torch.testing.assert_close(matching[name], value, rtol=1e-9, atol=1e-9)

    hybrid.strip_auxiliary()
    assert list(hybrid.state_dict()) == list(plain.state_dict())
    for one, other in zip(detect(hybrid, batch), before, strict=True):
        assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)
        assert torch.equal(one.scores, other.scores)
    assert_complete(hybrid, train_step(hybrid, batch))


def test_a_square_of_the_smallest_side_has_tokens_for_all_queries_of_the_small_config():
    """Tests shrink the number of queries; this is that of the config."""
    cfg = load_config(config_path("h_deformable_detr_small"))
    side = min(cfg.dataloader.train.mapper.augmentations.short_edges)
    tokens = sum((-(-side // stride)) ** 2 for stride in cfg.model.encoder.strides)
    matching = cfg.model.queries.matching
    assert matching.num_queries + matching.num_extra <= tokens


def test_too_small_an_image_for_the_extra_queries():
    model = build("h_deformable_detr_r50", "model.queries.matching.num_extra=400")
    with pytest.raises(ConfigError, match=r"420 queries .* lower num_extra of the source matching"):
        train_step(model, make_batch())


# --- query groups


def test_groups_are_as_many_detectors_that_share_a_decoder():
    groups, plain = build("group_detr_r50"), tiny_model(0, seed=1)
    randomize(groups)
    batch = make_batch()
    found = detect(groups, batch)
    together = output_of(groups, batch)
    assert [group.name for group in together.groups] == [
        "matching",
        *(f"group{index}" for index in range(1, 11)),
    ]
    for index in (0, 4):
        # The plain model with the queries of one group computes its losses.
        copy_shared(plain, groups)
        ours, theirs = plain.inference_source, list(groups.queries.values())[index]
        ours.num_queries = theirs.num_queries
        ours.content = copy.deepcopy(theirs.content)
        ours.load_state_dict(theirs.state_dict())
        prefix = together.groups[index].name
        for name, value in output_of(plain, batch).losses.items():
            other = together.losses[name.replace("matching", prefix)]
            torch.testing.assert_close(other, value, rtol=1e-9, atol=1e-9)
    groups.float().strip_auxiliary()
    assert list(groups.state_dict()) == list(plain.state_dict())
    for one, other in zip(detect(groups, batch), found, strict=True):
        assert torch.equal(one.scores, other.scores)


# --- single stage


def test_single_stage_boxes_hang_on_their_points():
    model = build("deformable_detr_single_stage_r50").double()
    randomize(model)
    memory = model.encode(model.preprocess(make_batch()))
    group, decoder = model.queries["matching"](memory), model.decoder
    query_set, content = QuerySet.concat([group]), group.content
    predictions = decoder(query_set, memory)
    for index, layer in enumerate(decoder.layers):  # the definition, layer by layer
        points = group.reference[:, :, None] * memory.valid_ratios[:, None]
        content = layer(content, group.position, points, memory, None)
        start = F.pad(inverse_sigmoid(group.reference, 1e-5), (0, 2))
        boxes = (decoder.box_heads[0](content) + start).sigmoid()
        torch.testing.assert_close(predictions.boxes[index], boxes)
        torch.testing.assert_close(predictions.logits[index], decoder.class_heads[0](content))
    predictions.boxes.sum().backward()
    assert model.queries["matching"].reference_points.weight.grad.any()


def test_first_boxes_have_an_eighth_of_the_image():
    model = build("deformable_detr_single_stage_r50")
    memory = model.encode(model.preprocess(make_batch()))
    group = model.queries["matching"](memory)
    boxes = model.decoder(QuerySet.concat([group]), memory).boxes
    torch.testing.assert_close(boxes[..., :2], group.reference.expand(2, -1, -1, -1))
    assert boxes[..., 2:].mean().item() == pytest.approx(0.119, abs=1e-3)


def test_points_can_be_refined_to_boxes():
    model = build(
        "deformable_detr_single_stage_r50",
        "model.decoder.refine_boxes=true",
        "model.decoder.look_forward_twice=true",
    )
    assert_complete(model, train_step(model, make_batch()))
    assert model.decoder.box_heads[0] is not model.decoder.box_heads[1]


def test_learned_queries_have_groups_too():
    cfg = shrink(load_config(config_path("deformable_detr_single_stage_r50")))
    cfg.model.num_classes = NUM_CLASSES
    cfg.model.queries.group1 = copy.deepcopy(cfg.model.queries.matching)
    cfg.model.queries.group1.training_only = True
    model = instantiate(cfg.model).to(DEVICE)
    losses = train_step(model, make_batch())
    assert_complete(model, losses)
    assert sum(name.startswith("group1.") for name in losses) == len(losses) / 2
    before = detect(model, make_batch())
    model.strip_auxiliary()
    assert len(model.queries) == 1
    for one, other in zip(detect(model, make_batch()), before, strict=True):
        assert torch.equal(one.scores, other.scores)


def test_points_and_boxes_do_not_mix():
    with pytest.raises(ConfigError, match="from_points=False needs 4 numbers"):
        train_step(
            build("deformable_detr_single_stage_r50", "model.decoder.from_points=false"),
            make_batch(),
        )
    model = build("deformable_detr_single_stage_r50").double()
    co_detr = tiny_model(1).double()
    memory = model.encode(model.preprocess(make_batch()))
    candidates, _ = make_candidates((5, 5), (20, 20))
    positive = co_detr.auxiliary.positive_queries["atss"]
    group = positive("atss_queries", candidates, memory.geometry)
    with pytest.raises(ConfigError, match="matching has reference points but others have boxes"):
        QuerySet.concat([model.queries["matching"](memory), group])


# --- a head on the encoder


@pytest.mark.parametrize("name", ON_ENCODER)
def test_a_head_on_the_encoder_is_the_auxiliary_head_alone(name):
    alone, both, batch = build(ON_ENCODER[name]), tiny_model(2), make_batch()
    randomize(both)
    assert copy_shared(alone, both) == len(alone.state_dict())
    assert both.auxiliary.loss_weight == 4.0 and alone.auxiliary.loss_weight == 1.0
    losses, expected = train_step(alone, batch), train_step(both, batch)
    if name == "atss":  # the other one samples, after different draws
        for key, value in losses.items():
            torch.testing.assert_close(4.0 * value, expected[key])
    assert set(losses) == {key for key in expected if key.startswith(f"{name}.")}
    both.evaluate_with = name
    for one, other in zip(detect(alone, batch), detect(both, batch), strict=True):
        assert torch.equal(one.scores, other.scores)
        assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model.evaluate_with=null"], "name the auxiliary head that detects"),
        (["model.evaluate_with=roi"], "names no detector of this model: it has atss"),
        (["model.auxiliary=null"], "names no detector of this model: it has none"),
        (["model.compare_top_k=true"], "compares detections of the decoder"),
    ],
)
def test_without_a_decoder_a_head_has_to_detect(overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build("atss_on_encoder_r50", *overrides)


@pytest.mark.parametrize("part", ["queries", "assigner", "criterion", "postprocessor", "decoder"])
def test_a_decoder_is_whole_or_absent(part):
    with pytest.raises(ConfigError, match=r"model.decoder is (not|null)|decoder to null"):
        build("h_deformable_detr_r50", f"model.{part}=null")


def test_nothing_is_left_to_strip_without_a_decoder():
    model = build("atss_on_encoder_r50")
    with pytest.raises(ConfigError, match="model.decoder is null"):
        model.strip_auxiliary()
    assert detect(model, make_batch())


@pytest.mark.parametrize("name", ["atss_on_encoder_r50", "h_deformable_detr_r50", "group_detr_r50"])
def test_checkpoints_are_read_for_prediction(name, tmp_path):
    model = build(name)
    randomize(model)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    cfg = shrink(load_config(config_path(name)))
    cfg.model.num_classes = NUM_CLASSES
    detector = load_detector(cfg, tmp_path / "model.pth")
    batch = make_batch()
    for one, other in zip(
        detect(detector.model.to(DEVICE), batch), detect(model, batch), strict=True
    ):
        assert torch.equal(one.scores, other.scores)


def test_a_head_cannot_be_exported(tmp_path):
    cfg = shrink(load_config(config_path("atss_on_encoder_r50")))
    detector = Detector(instantiate(cfg.model), [], cfg)
    with pytest.raises(ConfigError, match="model.decoder is null: only detections of a decoder"):
        settings = ExportSettings(format="torch_export")
        export_detector(detector, "atss", tmp_path / "model.pt2", settings)
