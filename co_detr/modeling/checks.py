"""Whether the parts that a config put together fit each other, asked when a model is built."""

from __future__ import annotations

from torch import nn

from co_detr.errors import ConfigError


def check_parts(model: nn.Module) -> None:
    """Looks over a complete ``CoDETR``.

    Raises:
        ConfigError: if parts disagree on ``num_classes``, no single inference source exists, or
            ``evaluate_with`` cannot be done.
    """
    _check_class_counts(model)
    inference_sources = [source for source in model.queries if not source.training_only]
    if len(inference_sources) != 1:
        raise ConfigError(
            "model.queries needs exactly one source that is not training-only, got "
            f"{len(inference_sources)}."
        )
    if model.evaluate_with is not None:
        _check_evaluated_head(model)


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


def _check_evaluated_head(model: nn.Module) -> None:
    names = [] if model.auxiliary is None else list(model.auxiliary.heads)
    if model.evaluate_with not in names:
        raise ConfigError(
            f"model.evaluate_with={model.evaluate_with} names no auxiliary head of this model: it "
            f"has {', '.join(names) or 'none'}; null evaluates the decoder."
        )
    if model.compare_top_k:
        raise ConfigError(
            "model.compare_top_k compares detections of the decoder: set it to false, or "
            "model.evaluate_with to null."
        )
