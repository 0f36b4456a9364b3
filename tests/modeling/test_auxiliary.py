"""How the auxiliary heads act together: weights, gradients, candidates, statistics."""

import pytest
import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage

from co_detr.errors import ConfigError
from tests.device import DEVICE
from tests.modeling.builders import (
    NUM_CLASSES,
    make_batch,
    randomize,
    tiny_config,
    tiny_model,
    train_step,
)

QUERIES = "model.auxiliary.positive_queries"


def run(model, batch, seed=0):
    """The whole output of a training step."""
    torch.manual_seed(seed)
    images = model.preprocess(batch)
    with EventStorage() as storage:
        output = model.forward_training(images, [sample["instances"] for sample in batch])
    return output, storage


def test_lambdas_weigh_their_losses():
    batch = make_batch()
    plain = train_step(tiny_model(2), batch)
    overrides = [f"{QUERIES}.loss_weight=3.0", "model.auxiliary.lambda_2=1.0"]
    changed = train_step(tiny_model(2, overrides), batch)
    assert changed.keys() == plain.keys()
    for name, value in changed.items():
        group = name.split(".")[0]
        factor = 3.0 if group.endswith("_queries") else 1.0 if group == "matching" else 0.5
        torch.testing.assert_close(value, factor * plain[name], msg=name)


def test_heads_without_positive_queries():
    losses = train_step(tiny_model(2, [f"{QUERIES}=null"]), make_batch())
    assert {name.split(".")[0] for name in losses} == {"matching", "roi", "atss"}


@pytest.mark.parametrize("name", ["roi", "atss"])
def test_losses_of_positive_queries_reach_the_encoder_through_the_features(name):
    model = tiny_model(2)
    randomize(model)
    output, _ = run(model, make_batch())
    group = next(group for group in output.groups if group.name == f"{name}_queries")
    (gradient,) = torch.autograd.grad(group.content.square().sum(), output.memory.tokens)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("train_encoder", [True, False])
def test_heads_may_learn_without_the_encoder(train_encoder):
    model = tiny_model(2, [f"model.auxiliary.train_encoder={train_encoder}"])
    randomize(model)
    output, _ = run(model, make_batch())
    tokens = output.memory.tokens

    def reaches(loss, parameter):
        (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)
        return gradient is not None and bool(gradient.abs().max() > 0)

    for name, head in model.auxiliary.heads.items():
        loss = sum(value for key, value in output.losses.items() if key.startswith(f"{name}."))
        assert reaches(loss, next(head.parameters()))
        assert reaches(loss, tokens) == train_encoder
        decoded = output.losses[f"{name}_queries.loss_cls"]
        assert reaches(decoded, tokens)


@pytest.mark.parametrize("name", ["roi", "atss"])
def test_candidates_fit_the_ground_truth(name):
    model = tiny_model(2)
    batch = make_batch(num_gts=(4, 0))
    output, _ = run(model, batch)
    assert [group.name for group in output.groups] == ["matching", "roi_queries", "atss_queries"]
    first, empty = output.auxiliary[name].candidates.instances
    truth = batch[0]["instances"].to(DEVICE)
    positive = first.gt_classes < NUM_CLASSES
    assert positive.any()
    for label, box in zip(first.gt_classes[positive], first.gt_boxes.tensor[positive], strict=True):
        same = (truth.gt_boxes.tensor == box).all(1)
        assert label in truth.gt_classes[same]
    assert (first.gt_boxes.tensor[~positive] == 0).all()
    assert (empty.gt_classes == NUM_CLASSES).all() and (empty.gt_boxes.tensor == 0).all()


def test_sampled_proposals_come_with_their_own_features():
    """Each candidate's feature is the mean of its region, also after sorting."""
    model = tiny_model(2)
    output, _ = run(model, make_batch(num_gts=(4, 3)))
    candidates = output.auxiliary["roi"].candidates
    roi_heads = model.auxiliary.heads.roi.roi_heads
    maps = model.auxiliary.pyramid(output.memory)
    for image, instances in enumerate(candidates.instances):
        labels = instances.gt_classes
        num_positives = int((labels < NUM_CLASSES).sum())
        assert (labels[:num_positives] < NUM_CLASSES).all()  # foreground first
        indices = torch.tensor([0, len(labels) - 1])
        own = [maps[name][image : image + 1] for name in roi_heads.box_in_features]
        pooled = roi_heads.box_pooler(own, [instances.proposal_boxes[indices]])
        torch.testing.assert_close(
            candidates.gather_features(image, indices), pooled.mean((2, 3)), rtol=1e-4, atol=1e-5
        )


def test_statistics_are_kept_apart_by_head():
    _, storage = run(tiny_model(2), make_batch())
    names = set(storage.latest())
    assert {"roi/roi_head/num_fg_samples", "roi/rpn/num_pos_anchors"} <= names


def test_parts_must_agree_on_the_number_of_classes():
    cfg = tiny_config(2)
    cfg.model.auxiliary.atss.num_classes = 7
    with pytest.raises(ConfigError, match=r"model.auxiliary.heads.atss is built for 7 classes"):
        instantiate(cfg.model)


def test_exactly_one_source_serves_inference():
    cfg = tiny_config(0)
    cfg.model.queries.other = cfg.model.queries.matching
    with pytest.raises(ConfigError, match="exactly one source .* got 2"):
        instantiate(cfg.model)
