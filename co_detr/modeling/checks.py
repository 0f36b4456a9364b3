"""Whether the parts that a config put together fit each other, asked when a model is built."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from co_detr.errors import ConfigError
from co_detr.modeling.detectors import check_detectors, require_detector

OF_DECODER = ("assigner", "criterion", "postprocessor")


def check_parts(model: nn.Module) -> None:
    """Looks over a complete ``CoDETR``.

    Raises:
        ConfigError: if parts disagree on ``num_classes`` or strides, no single inference source
            exists, ``evaluate_with`` cannot be done, ``merged`` or ``cascade`` need what is not
            there, or the decoder is left out by half.
    """
    _check_class_counts(model)
    _check_strides(model)
    check_detectors(model)
    if model.decoder is None:
        _check_without_decoder(model)
        return
    missing = [name for name in OF_DECODER if getattr(model, name) is None]
    if missing:
        raise ConfigError(
            f"model.{missing[0]} is null but model.decoder is not: set it, or the decoder to null."
        )
    inference_sources = [source for source in model.queries if not source.training_only]
    if len(inference_sources) != 1:
        raise ConfigError(
            "model.queries needs exactly one source that is not training-only, got "
            f"{len(inference_sources)}."
        )
    _check_names(model.queries)
    if model.evaluate_with is not None:
        _check_evaluated_detector(model)


def _check_names(queries: Iterable[nn.Module]) -> None:
    """Groups that are made from the data alone are checked again in every step."""
    names = [source.name for source in queries if hasattr(source, "name")]
    for place, source in enumerate(queries):
        seen = getattr(source, "sees", None)
        if seen is not None and seen not in names:
            raise ConfigError(
                f"model.queries.{place}.sees={seen} names no source of model.queries: it has "
                f"{', '.join(names)}."
            )


def _check_class_counts(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if path.startswith("backbone"):
            continue  # an image classifier's own class count means nothing here
        found = getattr(module, "num_classes", model.num_classes)
        if found != model.num_classes:
            raise ConfigError(
                f"model.{path} is built for {found} classes but model.num_classes is "
                f"{model.num_classes}; let it interpolate ${{model.num_classes}}."
            )


def _check_strides(model: nn.Module) -> None:
    strides = getattr(model.encoder, "strides", None)
    if strides is None:
        return
    given = [shape.stride for shape in model.backbone.output_shape().values()]
    if list(strides) != given:
        raise ConfigError(
            f"model.encoder measures images in cells of {list(strides)} pixels, but the maps of "
            f"model.backbone have the strides {given}: give it these, or null."
        )


def _check_without_decoder(model: nn.Module) -> None:
    if len(model.queries):
        raise ConfigError("model.decoder is null: set model.queries=[], nothing would decode them.")
    for name in OF_DECODER:
        if getattr(model, name) is not None:
            raise ConfigError(f"model.decoder is null: set model.{name}=null, too.")
    if model.auxiliary is not None and len(model.auxiliary.positive_queries):
        raise ConfigError(
            "model.decoder is null: set model.auxiliary.positive_queries=null, nothing would "
            "decode them."
        )
    if model.evaluate_with is None:
        raise ConfigError(
            "model.decoder is null: name the auxiliary head that detects in model.evaluate_with."
        )
    _check_evaluated_detector(model)


def _check_evaluated_detector(model: nn.Module) -> None:
    require_detector(model, model.evaluate_with)
    if model.compare_top_k:
        raise ConfigError(
            "model.compare_top_k compares detections of the decoder: set it to false, or "
            "model.evaluate_with to null."
        )
