"""Variants from a YAML file, and the order of their runs."""

from pathlib import Path

import pytest

from co_detr.errors import ConfigError
from co_detr.tools.ablate.grid import Grid, Variant, check_configs, plan_runs, read_grid_file
from tests.paths import config_path

ROOT = Path(__file__).resolve().parents[2]
EVIDENCE = ROOT / "configs/ablation/evidence.yaml"
SMALL = config_path("co_detr_small")

GOOD = """
config: a.py
overrides: [x=1]
seeds: [3, 4]
variants:
  - name: "K = 0"
    overrides: [y=2]
    seeds: [0]
  - name: Other, and more
    config: b.py
"""


@pytest.fixture
def read(tmp_path: Path):
    def parse(text: str, *overrides: str) -> Grid:
        path = tmp_path / "grid.yaml"
        path.write_text(text)
        return read_grid_file(str(path), overrides)

    return parse


def test_variants_take_over_what_they_do_not_set(read) -> None:
    first, second = read(GOOD, "z=3").variants
    assert first == Variant("K = 0", "a.py", ("x=1", "z=3", "y=2"), (0,))
    assert second == Variant("Other, and more", "b.py", ("x=1", "z=3"), (3, 4))


def test_seed_0_is_the_default(read) -> None:
    assert read("{config: a.py, variants: [{name: A}]}").variants[0].seeds == (0,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config: a.py\nvariant: []", "unknown key 'variant'"),
        ("variants: [{name: A, config: a.py, seed: 1}]", "variant 1 of .* unknown key 'seed'"),
        ("config: a.py", "no variants"),
        ("variants: [{name: A}]", "has no config"),
        ("{config: a.py, variants: [{seeds: [1]}]}", "has no name"),
        ("{config: a.py, variants: [{name: A}, {name: A}]}", "two variants have the name 'A'"),
        ("{config: a.py, variants: [{name: a b}, {name: A-b}]}", "share the folder a-b"),
        ("{config: a.py, variants: [{name: '?'}]}", "gives no folder name"),
        ("{config: a.py, variants: [{name: A, seeds: [1, 1]}]}", "different whole numbers"),
        ("{config: a.py, variants: [{name: A, seeds: [-1]}]}", "at least 0"),
        ("{config: a.py, variants: [{name: A, seeds: []}]}", "different whole numbers"),
        ("{config: a.py, variants: [{name: A, seeds: [true]}]}", "whole numbers"),
        ("{config: a.py, variants: [{name: A, seeds: 1}]}", "is no list"),
        ("{config: a.py, variants: [{name: 3}]}", "write it as text"),
        ("{config: a.py, variants: [A]}", "write it as `- name"),
        ("{config: a.py, variants: [{name: A, overrides: [{a: b}]}]}", "not of the form key=value"),
        ("{config: a.py, overrides: ['train.seed=1'], variants: [{name: A}]}", "train.seed is set"),
        ("{config: a.py, overrides: [train.output_dir=x], variants: [{name: A}]}", "output-dir"),
        ("variants: [", "is no YAML"),
        ("[1, 2]", "has no keys"),
    ],
)
def test_mistakes_are_one_sentence(read, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(text)
    assert "\n" not in str(caught.value)


def test_a_missing_grid_file() -> None:
    with pytest.raises(ConfigError, match="'none.yaml' does not exist"):
        read_grid_file("none.yaml")


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("K = 0", "k-0"),
        ("K=2 roi+atss, lambda_2=0.5", "k-2-roi-atss-lambda_2-0.5"),
        ("../H-DETR!", "h-detr"),
    ],
)
def test_slug(name: str, slug: str) -> None:
    assert Variant(name, "a.py", (), (0,)).slug == slug


def test_round_robin(read) -> None:
    grid = read(
        "{config: a.py, variants: [{name: A, seeds: [5, 1, 2]}, {name: B}, "
        "{name: C, seeds: [0, 1]}]}"
    )
    specs = plan_runs(grid, Path("out"))
    order = [(spec.variant.name, spec.seed) for spec in specs]
    assert order == [("A", 5), ("B", 0), ("C", 0), ("A", 1), ("C", 1), ("A", 2)]
    assert specs[4].folder == Path("out/c/seed1")


def test_arguments_of_a_run() -> None:
    variant = Variant("A", "a.py", ("x=1",), (7,))
    (spec,) = plan_runs(Grid((variant,)), Path("out, b"))
    assert spec.arguments == [
        *("--config-file", "a.py", "--resume", "x=1", "train.seed=7"),
        'train.output_dir="out, b/a/seed7"',
    ]


def test_configs_are_checked_before_anything_runs() -> None:
    def check(config: str, *overrides: str) -> None:
        check_configs(Grid((Variant("Mine", config, overrides, (0,)),)))

    check(SMALL)
    with pytest.raises(ConfigError, match="variant 'Mine': config file 'none.py' does not exist"):
        check("none.py")
    with pytest.raises(ConfigError, match="variant 'Mine': .*train.max_iters.*train.max_iter"):
        check(SMALL, "train.max_iters=3")
    with pytest.raises(ConfigError, match="set train.best_metric=AP"):
        check(SMALL, "train.best_metric=null")


def test_the_grid_of_the_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    grid = read_grid_file(str(EVIDENCE))
    check_configs(grid)
    several = {variant.name for variant in grid.variants if len(variant.seeds) > 1}
    assert {"K = 0", "K = 2: ATSS, Faster R-CNN"} <= several
