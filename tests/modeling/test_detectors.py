"""Decoder, heads, merged and cascade from one pass over the images."""

import copy
from collections import Counter

import pytest
import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances

from co_detr.errors import ConfigError
from co_detr.modeling.detectors import CascadeDetector, MergedDetector, first_stage_of
from co_detr.structures import Candidates, QuerySet
from tests.device import DEVICE, NAME
from tests.modeling.builders import (
    NUM_CLASSES,
    detect,
    evaluating,
    factor_of,
    is_inside,
    make_batch,
    randomize,
    shrink,
    tiny_config,
    tiny_model,
)
from tests.modeling.test_configs import load

HEADS = ["roi", "atss", "retinanet", "fcos", "paa", "gfl"]
FOUR = ["roi", "atss", "merged", "cascade"]
COMPARED = "model.compare_detectors=true"


def build(heads=2, *overrides):
    model = tiny_model(heads, overrides)
    randomize(model)
    return model


def run(model, batch):
    with evaluating(model):
        return model(batch)


def assert_same(one, other):
    assert len(one) == len(other)
    assert torch.equal(one.scores, other.scores)
    assert torch.equal(one.pred_classes, other.pred_classes)
    assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)


def head_detections(model, name, batch):
    """(images, memory, HeadDetections) in eval mode."""
    images = model.preprocess(batch)
    memory = model.encode(images)
    return memory, model.auxiliary.heads[name].detect(images, model.auxiliary.pyramid(memory))


# --- one pass


def test_every_detector_is_what_it_is_alone():
    model, batch = build(2, COMPARED), make_batch()
    for sample in batch:  # scaling to the output works in place
        sample.update(height=2 * sample["height"], width=3 * sample["width"])
    together = run(model, batch)
    assert [list(results) for results in together] == [
        ["instances", *(f"instances_{name}" for name in FOUR)]
    ] * 2
    for name in ("decoder", *FOUR):
        model.evaluate_with = name
        key = "instances" if name == "decoder" else f"instances_{name}"
        for found, alone in zip(together, detect(model, batch), strict=True):
            assert len(alone) and is_inside(alone)
            assert_same(found[key], alone)


def test_detections_differ_from_detector_to_detector():
    (found, _) = run(build(2, COMPARED), make_batch())
    boxes = [instances.pred_boxes.tensor for instances in found.values()]
    for index, one in enumerate(boxes):
        assert not any(torch.equal(one, other) for other in boxes[:index])


def test_shared_parts_run_once():
    model, calls = build(2, COMPARED), Counter()
    auxiliary = model.auxiliary
    parts = {"backbone": model.backbone, "encoder": model.encoder, "pyramid": auxiliary.pyramid}
    parts |= {"source": model.inference_source, "rpn": auxiliary.heads.roi.rpn}
    for name, part in {**parts, "decoder": model.decoder}.items():
        part.register_forward_hook(lambda *_, name=name: calls.update([name]))
    run(model, make_batch())
    assert calls == dict.fromkeys(parts, 1) | {"decoder": 2}  # matched queries; those of cascade


@pytest.mark.parametrize("config", ["co_detr_r50", "co_dino_r50"])
def test_the_decoder_does_not_notice_the_others(config):
    cfg = shrink(load(config, f"model.num_classes={NUM_CLASSES}"))
    torch.manual_seed(0)
    model = instantiate(cfg.model).to(DEVICE)
    randomize(model)
    batch = make_batch()
    assert not model.compare_detectors
    before = detect(model, batch)
    model.compare_detectors = True
    for found, expected in zip(run(model, batch), before, strict=True):
        assert_same(found["instances"], expected)
        assert len(found) == 5


def test_a_model_without_heads_has_nothing_to_compare():
    model = build(0, COMPARED)
    assert model.compared == [] and model.detectors == ["decoder"]
    assert [list(results) for results in run(model, make_batch())] == [["instances"]] * 2


def test_one_detector_by_name_is_all_that_runs():
    model = build(2, COMPARED, "model.evaluate_with=atss")
    model.decoder.forward = model.auxiliary.heads.roi.forward = None
    assert [list(results) for results in run(model, make_batch())] == [["instances"]] * 2


def test_top_k_and_detectors_of_a_model_with_soft_nms():
    cfg = shrink(load("co_dino_r50", "model.compare_top_k=true", COMPARED))
    model = instantiate(cfg.model).to(DEVICE)
    (found, _) = run(model, make_batch())
    assert list(found) == ["instances", *(f"instances_{name}" for name in ("top_k", *FOUR))]
    lists = [found[key] for key in ("instances", "instances_roi", "instances_atss")]
    assert_same(found["instances_merged"], model.auxiliary.merged.merge(lists))


@pytest.mark.parametrize("name", ["co_conditional_detr_r50", "co_dab_detr_r50"])
def test_single_scale_models_have_them_all(name):
    cfg = shrink(load(name, COMPARED))
    model = instantiate(cfg.model).to(DEVICE)
    for found in run(model, make_batch()):
        assert list(found) == ["instances", *(f"instances_{name}" for name in FOUR)]
        assert all(len(instances) and is_inside(instances) for instances in found.values())


@pytest.mark.skipif(NAME == "emulated", reason="its autocast changes nothing")
def test_mixed_precision():
    model, batch = build(2, COMPARED), make_batch()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        outputs = run(model, batch)
    for kind in ("instances_merged", "instances_cascade"):
        for found in outputs:
            assert found[kind].scores.dtype == torch.float32
            assert len(found[kind]) and is_inside(found[kind])


# --- merged


def instances(boxes, scores, classes, **fields):
    return Instances(
        (100, 100),
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        scores=torch.tensor(scores),
        pred_classes=torch.tensor(classes, dtype=torch.long),
        **fields,
    )


FIRST = instances([[0, 0, 50, 50], [0, 0, 50, 48]], [0.9, 0.5], [0, 1])
SECOND = instances([[0, 0, 50, 45], [60, 60, 90, 90], [0, 0, 25, 50]], [0.8, 0.7, 0.6], [0, 0, 0])


def test_merging_drops_what_a_better_one_of_its_class_overlaps():
    merged = MergedDetector().merge([FIRST, SECOND])
    assert merged.scores.tolist() == pytest.approx([0.9, 0.7, 0.6])  # 0.8 overlaps 0.9 by 0.9
    assert merged.pred_classes.tolist() == [0, 0, 0]  # as long as the longest list
    assert merged.pred_boxes.tensor[1].tolist() == [60, 60, 90, 90]
    strict = MergedDetector(nms_threshold=0.45).merge([FIRST, SECOND])
    assert strict.scores.tolist() == pytest.approx([0.9, 0.7, 0.5])
    assert strict.pred_classes.tolist() == [0, 0, 1]


def test_masks_do_not_disturb_merging():
    masked = copy.deepcopy(FIRST)
    masked.pred_masks = torch.zeros(2, 1, 28, 28)
    merged = MergedDetector().merge([SECOND, masked])
    assert set(merged.get_fields()) == {"pred_boxes", "scores", "pred_classes"}


def test_nothing_to_merge():
    nothing = instances([], [], [])
    assert len(MergedDetector().merge([nothing, nothing])) == 0
    assert_same(MergedDetector().merge([nothing, FIRST]), FIRST)


def test_what_clipping_left_nothing_of_takes_no_place():
    """An image drops empty boxes in the end; until then they must not push others out."""
    found = instances([[100, 0, 100, 50], [0, 0, 50, 50]], [0.9, 0.8], [0, 0])
    assert MergedDetector().merge([found]).scores.tolist() == pytest.approx([0.8])
    combined = CascadeDetector().combine(
        found, torch.zeros(2, 2), torch.full((2, 4), 0.5), factor_of(found.image_size)
    )
    assert combined.scores.tolist() == pytest.approx([0.8])


def test_members_can_be_chosen():
    model, batch = build(2, "model.auxiliary.merged.members=[roi,cascade]", COMPARED), make_batch()
    for found in run(model, batch):
        expected = model.auxiliary.merged.merge(
            [found["instances_roi"], found["instances_cascade"]]
        )
        assert_same(found["instances_merged"], expected)


# --- cascade


@pytest.mark.parametrize("name", HEADS)
def test_every_head_can_be_the_first_stage(name):
    model = build(6, f"model.auxiliary.cascade.head={name}", COMPARED)
    for found in run(model, make_batch()):
        head, cascade = found[f"instances_{name}"], found["instances_cascade"]
        assert len(head) == len(cascade) > 0 and is_inside(cascade)
        assert torch.equal(head.scores, cascade.scores)
        assert torch.equal(head.pred_classes, cascade.pred_classes)
        assert (head.pred_boxes.tensor - cascade.pred_boxes.tensor).abs().max() > 1


@pytest.mark.parametrize(
    ("heads", "first"), [(["atss", "roi"], "roi"), (["paa", "gfl"], "gfl"), (["atss"], "atss")]
)
def test_the_first_stage_does_not_depend_on_the_order_of_a_config(heads, first):
    nodes = tiny_config(6).model
    nodes.auxiliary = {
        **{key: node for key, node in nodes.auxiliary.items() if key not in HEADS},
        **{name: nodes.auxiliary[name] for name in heads},
    }
    assert first_stage_of(instantiate(nodes)) == first


@pytest.mark.parametrize("name", ["roi", "atss"])
def test_with_boxes_and_scores_of_the_head_it_is_the_head(name):
    rules = [f"model.auxiliary.cascade.{key}=0" for key in ("box_share", "score_share")]
    model = build(2, f"model.auxiliary.cascade.head={name}", *rules, COMPARED)
    for found in run(model, make_batch()):
        assert_same(found["instances_cascade"], found[f"instances_{name}"])


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_a_detection_is_decoded_by_itself(name):
    """In another order, and with half of the others gone, each comes out the same."""
    model = build(6).eval()
    memory, found = head_detections(model, name, make_batch())
    source = model.auxiliary.positive_queries[name]

    def decode(candidates):
        queries = source.of_detections(name, candidates, memory.geometry)
        decoded = model.decoder(QuerySet.concat([queries]), memory)
        return decoded.logits[-1], decoded.boxes[-1]

    logits, boxes = decode(found.candidates)
    order = [torch.randperm(len(image))[: len(image) // 2] for image in found.instances]
    some = Candidates(
        [
            instances[index]
            for instances, index in zip(found.candidates.instances, order, strict=True)
        ],
        lambda image, indices: found.candidates.gather_features(image, order[image][indices]),
    )
    for image, (some_logits, some_boxes) in enumerate(zip(*decode(some), strict=True)):
        count = len(order[image])
        torch.testing.assert_close(some_logits[:count], logits[image, order[image]])
        torch.testing.assert_close(some_boxes[:count], boxes[image, order[image]])


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_features_are_those_of_where_the_detection_comes_from(name):
    """Of an image in a batch, they are those that it has alone; of a dense head, a cell's."""
    model = build(6).eval()
    batch = make_batch(sizes=((96, 128), (96, 128)))
    memory, found = head_detections(model, name, batch)
    _, alone = head_detections(model, name, batch[1:])
    rows = torch.arange(0, len(alone.instances[0]), 3)
    torch.testing.assert_close(found.instances[1].scores, alone.instances[0].scores)
    features = found.candidates.gather_features(1, rows)
    torch.testing.assert_close(features, alone.candidates.gather_features(0, rows))
    head = model.auxiliary.heads[name]
    maps = model.auxiliary.pyramid(memory)
    starts = found.candidates.instances[1].proposal_boxes[rows].tensor
    boxes = found.instances[1].pred_boxes[rows].tensor
    if name == "roi":
        assert torch.equal(starts, boxes)
        pooled = head.roi_heads.box_pooler(
            [maps[key] for key in head.roi_heads.box_in_features],
            [Boxes(boxes[:0]), Boxes(boxes)],
        )
        torch.testing.assert_close(features, pooled.mean((2, 3)))
        return
    # The anchor is one whose prediction, decoded, is the detected box.
    maps = [maps[key] for key in head.in_features]
    anchors, predictions = torch.cat(head.anchors(maps)), head.predict(maps)
    decoded = Boxes(head.box_code.decode(predictions.deltas[1], anchors))
    decoded.clip((96, 128))
    cells = torch.cat([level_map[1].flatten(1).T for level_map in maps])
    for start, feature, box in zip(starts, features, boxes, strict=True):
        gap = (decoded.tensor - box).abs().amax(1)
        nearest = (gap <= gap.min() + 1e-4).nonzero().squeeze(1)
        own = nearest[(anchors[nearest] == start).all(1)]
        assert len(own) and torch.equal(cells[own[0] // head.num_anchors], feature)


def decoded_example():
    found = instances([[10, 10, 30, 30], [40, 40, 80, 60]], [0.64, 0.36], [1, 0])
    logits = torch.tensor([[5.0, 0.0], [2.0, -3.0]])  # the decoder prefers class 0 for both
    # The second one leaves the image.
    boxes = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.8, 0.5, 0.6, 0.4]])
    return found, logits, boxes, factor_of(found.image_size)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0, [[10, 10, 30, 30], [40, 40, 80, 60]]),
        (0.25, [[10, 10, 30, 30], [42.5, 37.5, 85, 62.5]]),
        (0.5, [[10, 10, 30, 30], [45, 35, 90, 65]]),
        (1, [[10, 10, 30, 30], [50, 30, 100, 70]]),
    ],
)
def test_how_boxes_are_combined(share, expected):
    combined = CascadeDetector(box_share=share).combine(*decoded_example())
    torch.testing.assert_close(combined.pred_boxes.tensor, torch.tensor(expected).float())
    assert combined.scores.tolist() == pytest.approx([0.64, 0.36])


def test_how_scores_are_combined():
    found, logits, boxes, factor = decoded_example()
    agreed = [torch.tensor(value).sigmoid().item() for value in (2.0, 0.0)]
    combined = CascadeDetector(score_share=1).combine(found, logits, boxes, factor)
    assert combined.scores.tolist() == pytest.approx(agreed)
    assert combined.pred_classes.tolist() == [0, 1]  # the second one is now the better one
    assert combined.pred_boxes.tensor[1].tolist() == pytest.approx([10, 10, 30, 30])
    combined = CascadeDetector(score_share=0.5).combine(found, logits, boxes, factor)
    assert combined.scores.tolist() == pytest.approx(
        [(0.64 * 0.5) ** 0.5, (0.36 * agreed[0]) ** 0.5]
    )


def test_nothing_to_decode():
    model, batch = build(2, COMPARED), make_batch()
    predictor = model.auxiliary.heads.roi.roi_heads.box_predictor
    predictor.test_score_thresh = 2.0
    for found in run(model, batch):
        assert len(found["instances_cascade"]) == len(found["instances_roi"]) == 0
        assert len(found["instances_merged"])
    predictor.test_score_thresh = 0.0
    # An image without detections beside one that has some.
    head = model.auxiliary.heads.roi
    original = head.roi_heads.forward

    def nothing_in_the_first(*arguments):
        (first, second), losses = original(*arguments)
        return [first[:0], second], losses

    head.roi_heads.forward = nothing_in_the_first
    first, second = run(model, batch)
    assert len(first["instances_cascade"]) == 0
    assert len(second["instances_cascade"]) == len(second["instances_roi"]) > 0


# --- what a model has


@pytest.mark.parametrize(
    ("heads", "overrides", "names"),
    [
        (1, [], ["decoder", "atss", "merged", "cascade"]),
        (2, ["model.auxiliary.merged=null"], ["decoder", "roi", "atss", "cascade"]),
        (2, ["model.auxiliary.cascade=null"], ["decoder", "roi", "atss", "merged"]),
        (2, ["model.auxiliary.positive_queries=null"], ["decoder", "roi", "atss", "merged"]),
    ],
)
def test_detectors_of_a_model(heads, overrides, names):
    assert tiny_model(heads, overrides).detectors == names


def test_configs_that_were_saved_before_there_were_such_detectors():
    cfg = tiny_config(2)
    del cfg.model.auxiliary.merged, cfg.model.auxiliary.cascade
    model = instantiate(cfg.model)
    assert model.detectors == ["decoder", *FOUR]
    assert model.auxiliary.cascade == tiny_model(2).auxiliary.cascade
    assert model.auxiliary.merged == tiny_model(2).auxiliary.merged


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.auxiliary.merged.nms_threshold=0"], "nms_threshold=0 must be above 0"),
        (["model.auxiliary.merged.members=[roi,fcos]"], "merged.members names fcos: choose among"),
        (["model.auxiliary.merged.members=[merged]"], "names merged: choose among decoder, roi"),
        (["model.auxiliary.cascade.box_share=1.5"], "box_share=1.5 must be from 0 .*head"),
        (["model.auxiliary.cascade.score_share=-1"], "score_share=-1 must be from 0 .*head"),
        (["model.auxiliary.cascade.head=fcos"], "cascade.head names fcos: choose among roi, atss"),
        (
            ["model.auxiliary.positive_queries=null", "model.evaluate_with=cascade"],
            "cascade needs a decoder and model.auxiliary.positive_queries",
        ),
        (["model.queries.matching.num_queries=0"], "num_queries=0 must be a whole number"),
        (["model.queries.matching.num_queries=null"], "num_queries=None must be a whole number"),
        (["model.postprocessor.max_detections=-1"], "max_detections=-1 must be a whole number"),
        (["model.auxiliary.positive_queries.max_queries=0"], "max_queries=0 must be a whole"),
        (["model.auxiliary.positive_queries.min_queries=-1"], "min_queries=-1 must be a whole"),
    ],
)
def test_settings_that_cannot_be(overrides, message):
    with pytest.raises(ConfigError, match=message):
        instantiate(tiny_config(2, overrides).model)


@pytest.mark.parametrize("name", ["decoder", "top_k", "bbox"])
def test_names_that_heads_cannot_have(name):
    cfg = tiny_config(2)
    cfg.model.auxiliary[name] = cfg.model.auxiliary.pop("atss")
    with pytest.raises(ConfigError, match=f"a head cannot be called {name}"):
        instantiate(cfg.model)


def test_a_stripped_model_has_its_decoder_left():
    model = build(2, COMPARED, "model.evaluate_with=roi")
    model.strip_auxiliary()
    assert model.detectors == ["decoder"] and model.compared == []
    model.evaluate_with = "roi"
    with pytest.raises(ConfigError, match="it has its decoder alone .*stripped"):
        detect(model, make_batch())
