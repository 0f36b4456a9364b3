"""Combinations of heads, positive queries and loss weights."""

import pytest

from co_detr.engine.config import load_config
from co_detr.errors import ConfigError
from co_detr.tools.ablate.grid import Axes, combine
from tests.paths import config_path

SMALL = config_path("co_detr_small")


def names(axes: Axes, config: str = SMALL, *overrides: str) -> list[str]:
    return [variant.name for variant in combine(config, axes, [0], overrides).variants]


def test_everything_once() -> None:
    axes = Axes(("none", "atss", "roi", "roi+atss"), ("on", "off"), (1.0,), (1.0, 2.0))
    found = names(axes)
    # K = 0 has none of the others; without queries there is no lambda_1.
    assert len(found) == 1 + 3 * (2 + 2)
    assert found[:5] == [
        "K=0",
        "K=1 atss, queries on, lambda_1=1, lambda_2=1",
        "K=1 atss, queries on, lambda_1=1, lambda_2=2",
        "K=1 atss, queries off, lambda_2=1",
        "K=1 atss, queries off, lambda_2=2",
    ]


def test_lambda_1_does_not_multiply_what_has_no_queries() -> None:
    assert len(names(Axes(("roi",), ("on", "off"), (0.5, 1.0, 2.0)))) == 3 + 1
    assert len(names(Axes(("roi",), ("off",), (0.5, 1.0, 2.0)))) == 1


def test_without_axes_it_is_the_config() -> None:
    (variant,) = combine(SMALL, Axes(), [4, 5], ["train.max_iter=7"]).variants
    assert (variant.name, variant.seeds) == ("K=2 roi+atss", (4, 5))
    assert variant.overrides == ("train.max_iter=7",)


def test_overrides_make_what_the_name_says() -> None:
    axes = Axes(("none", "atss"), ("on", "off"), (0.25,), (1e-5,))
    none, on, off = (
        load_config(variant.config, variant.overrides).model
        for variant in combine(SMALL, axes, [0]).variants
    )
    assert none.auxiliary is None
    for model in (on, off):
        assert model.auxiliary.roi is None and model.auxiliary.atss is not None
        assert model.auxiliary.lambda_2 == 1e-5
    assert on.auxiliary.positive_queries.loss_weight == 0.25
    assert off.auxiliary.positive_queries is None


def test_all_heads_of_a_config_are_known() -> None:
    config = config_path("co_detr_r50_k6")
    grid = combine(config, Axes(("paa+gfl+roi",)), [0])
    assert grid.variants[0].name == "K=3 roi+paa+gfl"
    auxiliary = load_config(config, grid.variants[0].overrides).model.auxiliary
    off = [name for name in auxiliary if auxiliary[name] is None]
    assert sorted(off) == ["atss", "fcos", "retinanet"]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (Axes(("rpn",)), "no head 'rpn'; it has roi, atss"),
        (Axes(("roi+roi",)), "names a head twice"),
        (Axes(("roi", "roi")), "two variants have the name"),
        (Axes(("roi+atss", "atss+roi")), "two variants have the name"),
        (Axes(("none", "none")), "two variants have the name"),
    ],
)
def test_mistakes(axes: Axes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        combine(SMALL, axes, [0])


def test_what_the_config_has_not_cannot_be_combined() -> None:
    with pytest.raises(ConfigError, match="has no auxiliary heads"):
        combine(config_path("deformable_detr_r50"), Axes(("none",)), [0])
    with pytest.raises(ConfigError, match="for --positive-queries on"):
        names(Axes((), ("on",)), SMALL, "model.auxiliary.positive_queries=null")
