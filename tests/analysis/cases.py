"""Subjects and samples that the tests of the measures share."""

import torch
from detectron2.config import instantiate

from co_detr.engine.config import load_config
from co_detr.tools.analyze.subjects import Sample, Subject
from tests.modeling.builders import (
    NUM_CLASSES,
    make_batch,
    randomize,
    shrink,
    tiny_config,
    tiny_model,
)
from tests.paths import config_path


def tiny_subject(heads: int = 2, name: str | None = None, overrides=(), seed: int = 0) -> Subject:
    """A tiny model in eval mode with random weights."""
    model = tiny_model(heads, overrides, seed).eval()
    randomize(model, seed)
    return Subject(name or f"K = {heads}", model, tiny_config(heads, overrides))


def tiny_samples(sizes=((96, 128), (80, 112)), num_gts=(3, 2), seed: int = 0) -> list[Sample]:
    batch = make_batch(sizes, num_gts, seed)
    return [Sample(entry, f"{index}.png", entry["image_id"]) for index, entry in enumerate(batch)]


def encoder_only_subject() -> Subject:
    """A detector without a decoder: ATSS on the encoder."""
    cfg = shrink(load_config(config_path("atss_on_encoder_r50")))
    cfg.model.num_classes = NUM_CLASSES
    torch.manual_seed(0)
    model = instantiate(cfg.model).eval()
    randomize(model)
    return Subject("encoder only", model, cfg)


def plain(samples):
    """A progress that shows nothing."""
    return samples
