"""Evaluation with one auxiliary head instead of the decoder."""

import pytest
import torch
from detectron2.config import instantiate

from co_detr.engine.train import run_evaluation_only
from co_detr.errors import ConfigError
from tests.modeling.builders import (
    detect,
    evaluating,
    head_detections,
    is_inside,
    make_batch,
    randomize,
    tiny_config,
    tiny_model,
)


def build(*overrides):
    model = tiny_model(2, overrides)
    randomize(model)
    return model


@pytest.mark.parametrize("name", ["roi", "atss"])
def test_a_head_detects_in_output_resolution(name):
    model = build(f"model.evaluate_with={name}")
    batch = make_batch()
    for sample in batch:
        sample.update(height=2 * sample["height"], width=2 * sample["width"])
    images = model.preprocess(batch)
    with evaluating(model):
        expected = head_detections(model, name, images)
    for found, own, sample in zip(detect(model, batch), expected, batch, strict=True):
        assert found.image_size == (sample["height"], sample["width"])
        assert is_inside(found) and len(found)
        own = own[own.pred_boxes.nonempty()]  # others are dropped, as those of the decoder are
        torch.testing.assert_close(found.pred_boxes.tensor, 2 * own.pred_boxes.tensor)
        assert torch.equal(found.scores, own.scores)


def test_the_decoder_does_not_run():
    model = build("model.evaluate_with=atss")
    model.decoder.forward = None
    assert not model.predicts_masks
    assert len(detect(model, make_batch())) == 2


def test_null_is_the_decoder():
    batch = make_batch()
    plain, switched = build(), build("model.evaluate_with=null")
    for one, other in zip(detect(plain, batch), detect(switched, batch), strict=True):
        assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)
        assert torch.equal(one.scores, other.scores)


def test_what_is_left_after_stripping_detects_with_the_decoder():
    batch = make_batch()
    expected = detect(build(), batch)
    model = build("model.evaluate_with=roi")
    model.strip_auxiliary()
    for one, other in zip(detect(model, batch), expected, strict=True):
        assert torch.equal(one.scores, other.scores)


@pytest.mark.parametrize(
    ("heads", "overrides", "message"),
    [
        (
            2,
            ["model.evaluate_with=fcos"],
            "evaluate_with=fcos names no .* has decoder, roi, atss, merged, cascade; null is",
        ),
        (0, ["model.evaluate_with=atss"], "evaluate_with=atss names no .* its decoder alone"),
        (2, ["model.auxiliary.roi=null", "model.evaluate_with=roi"], "it has decoder, atss, "),
        (2, ["model.evaluate_with=roi", "model.compare_top_k=true"], "compares detections of the"),
    ],
)
def test_heads_that_cannot_be_evaluated(heads, overrides, message):
    with pytest.raises(ConfigError, match=message):
        instantiate(tiny_config(heads, overrides).model)


def test_a_head_that_is_null_is_left_out():
    model = tiny_model(2, ["model.auxiliary.roi=null"])
    assert list(model.auxiliary.heads) == list(model.auxiliary.positive_queries) == ["atss"]
    with pytest.raises(ConfigError, match="needs a head"):
        tiny_model(2, ["model.auxiliary.roi=null", "model.auxiliary.atss=null"])


def test_each_head_gets_coco_metrics(rectangles):
    cfg = tiny_config(2, [*rectangles, "model.evaluate_with=atss"])
    assert {"AP", "AP50", "AP-red"} <= set(run_evaluation_only(cfg, resume=False))


FOUR = ("roi", "atss", "merged", "cascade")


def test_one_evaluation_gives_the_numbers_of_one_for_each(rectangles, tmp_path):
    """Those of a head by itself are what `evaluate_with` gives; of small configs, in every run."""
    overrides = [*rectangles, "model.compare_detectors=true"]

    def evaluate(*further):
        torch.manual_seed(0)
        return run_evaluation_only(tiny_config(2, [*overrides, *further]), resume=False)

    together = evaluate()
    for name in ("decoder", *FOUR):
        out = tmp_path / name
        alone = evaluate(f"model.evaluate_with={name}", f"train.output_dir={out}")
        assert "AP" in alone and not any("/" in key for key in alone)
        folder, prefix = tmp_path / "out", ""
        if name != "decoder":
            folder, prefix = folder / name, f"{name}/"
        assert alone == {key: together[prefix + key] for key in alone}
        own = out / "coco_instances_results.json"
        assert own.read_text() == (folder / own.name).read_text()


def test_without_heads_an_evaluation_is_as_ever(rectangles, tmp_path):
    results = []
    for overrides in ([], ["model.compare_detectors=true"]):
        torch.manual_seed(0)
        cfg = tiny_config(0, [*rectangles, *overrides])
        results.append(run_evaluation_only(cfg, resume=False))
    assert results[0] == results[1] and "AP" in results[0]
    assert not any(path.is_dir() for path in (tmp_path / "out").iterdir())
