"""The averaged weights that a checkpoint may hold beside those that training goes on from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

from co_detr.errors import ConfigError

logger = logging.getLogger(__name__)

AVERAGED = "ema"  # the checkpoint's key: what `AveragedModel.state_dict` gives
_PREFIX = "module."

Weights = Literal["ema", "raw"]


def has_averaged(content: Mapping[str, Any]) -> bool:
    """Whether a loaded checkpoint of this project has averaged weights."""
    averaged = content.get(AVERAGED)
    return isinstance(averaged, Mapping) and "n_averaged" in averaged


def choose_weights(content: Mapping[str, Any], weights: Weights, path: str) -> dict[str, Any]:
    """A loaded checkpoint whose ``model`` is the chosen set of weights, where it has two.

    Args:
        content: what the file holds.
        weights: "ema" for the averaged ones, "raw" for those that the optimiser works on.
        path: of the file, for the log.

    Raises:
        ConfigError: if ``weights`` is neither.
    """
    if weights not in ("ema", "raw"):
        raise ConfigError(f'train.init_checkpoint_weights={weights} must be "ema" or "raw".')
    if not has_averaged(content):
        return dict(content)
    if weights == "raw":
        logger.info("%s: its raw weights are used, not the averaged ones (EMA).", path)
        return dict(content)
    averaged = content[AVERAGED]
    logger.info(
        "%s: its averaged weights (EMA of %d steps) are used; "
        "train.init_checkpoint_weights=raw takes the others.",
        *(path, int(averaged["n_averaged"])),
    )
    state = {
        key.removeprefix(_PREFIX): value
        for key, value in averaged.items()
        if key.startswith(_PREFIX)
    }
    return {**content, "model": state}
