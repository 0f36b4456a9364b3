"""tools/split_dataset.py: every image once, classes in equal shares, groups stay together."""

import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import yaml

from co_detr.engine.config import load_config
from co_detr.errors import exit_code
from co_detr.tools.ablate.grid import read_grid_file
from co_detr.tools.split_dataset import parse_arguments, run
from tests.paths import config_path

CLASSES = ("common", "seldom", "rare")


def made_up(images: int = 120) -> dict:
    """Six frames of each video, in the names of the files; a tenth of the images is empty."""
    random = Random(0)
    annotations = []
    for image in range(1, images + 1):
        for _ in range(random.randrange(1, 6) if image % 10 else 0):
            category = random.choices((4, 7, 9), (20, 4, 1))[0]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": category}
                | {"bbox": [1, 2, 30, 40], "iscrowd": int(random.random() < 0.05)}
            )
    return {
        "info": {"contributor": "A"},
        "images": [
            {"id": n, "file_name": f"clip{n // 6}_{n}.jpg", "width": 64, "height": 64}
            | {"camera": n % 3}
            for n in range(1, images + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": k, "name": n} for k, n in zip((4, 7, 9), CLASSES, strict=True)],
    }


@pytest.fixture
def split(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs the tool on a file; returns its status and what it says."""

    def run_on(content: dict, *flags: str) -> tuple[int, str]:
        (tmp_path / "all.json").write_text(json.dumps(content))
        arguments = [str(tmp_path / "all.json"), "--output", str(tmp_path / "out"), *flags]
        status = exit_code(lambda: run(parse_arguments(arguments)))
        said = capsys.readouterr()
        return status, said.out + said.err

    return run_on


def read(tmp_path: Path, name: str) -> dict:
    return json.loads((tmp_path / "out" / f"{name}.json").read_text())


def objects(content: dict) -> Counter:
    return Counter(a["category_id"] for a in content["annotations"] if not a["iscrowd"])


def image_ids(content: dict) -> set:
    return {image["id"] for image in content["images"]}


def test_every_image_is_in_one_val_set_with_all_that_belongs_to_it(split, tmp_path: Path) -> None:
    whole = made_up()
    status, said = split(whole, "--folds", "4")
    assert status == 0 and "fold4/val" in said
    vals = [read(tmp_path, f"fold{n}/val") for n in (1, 2, 3, 4)]
    assert sorted(i for val in vals for i in image_ids(val)) == sorted(image_ids(whole))
    for number, val in enumerate(vals, start=1):
        train = read(tmp_path, f"fold{number}/train")
        assert image_ids(train) == image_ids(whole) - image_ids(val)
        for part in (train, val):
            assert part["categories"] == whole["categories"] and part["info"] == whole["info"]
            assert image_ids(part) >= {a["image_id"] for a in part["annotations"]}
        parts = train["annotations"] + val["annotations"]
        assert sorted(a["id"] for a in parts) == [a["id"] for a in whole["annotations"]]


def test_classes_are_in_equal_shares(split, tmp_path: Path) -> None:
    whole = made_up()
    split(whole, "--folds", "4")
    for number in (1, 2, 3, 4):
        val = read(tmp_path, f"fold{number}/val")
        assert abs(len(val["images"]) - 30) <= 1
        for key, total in objects(whole).items():
            assert abs(objects(val)[key] - total / 4) <= 2, (number, key)


def test_a_fifth_for_val_and_the_same_again(split, tmp_path: Path) -> None:
    whole = made_up()
    split(whole, "--val", "0.2")
    first = read(tmp_path, "val")
    assert abs(len(first["images"]) - 24) <= 1
    assert abs(objects(first).total() - objects(whole).total() / 5) <= 4
    assert split(whole, "--val", "0.2")[0] == 2  # the files are there
    split(whole, "--val", "0.2", "--force")
    assert read(tmp_path, "val") == first
    split(whole, "--val", "0.2", "--force", "--seed", "1")
    assert image_ids(read(tmp_path, "val")) != image_ids(first)


@pytest.mark.parametrize("pattern", [None, r"clip(\d+)_"])
def test_groups_stay_together(split, tmp_path: Path, pattern: str | None) -> None:
    whole = made_up()
    for image in whole["images"]:
        image["clip"] = image["id"] // 6
    flags = ["--group-by", "clip"] if pattern is None else ["--group-by", "file_name"]
    flags += [] if pattern is None else ["--group-pattern", pattern]
    split(whole, "--folds", "3", *flags)
    clips = [{n // 6 for n in image_ids(read(tmp_path, f"fold{k}/val"))} for k in (1, 2, 3)]
    assert not (clips[0] & clips[1] or clips[0] & clips[2] or clips[1] & clips[2])
    assert min(map(len, clips)) >= 5  # of 21


def test_what_cannot_be_equal_is_told(split) -> None:
    whole = made_up(12)
    whole["annotations"] = [a | {"category_id": 4} for a in whole["annotations"]]
    whole["annotations"][0]["category_id"] = 9
    for image in whole["images"]:
        image["camera"] = min(image["id"], 3) if image["id"] < 4 else 3
    _, said = split(whole, "--folds", "3", "--group-by", "camera")
    assert "note: group '3' has 10 of 12 images, more than a part" in said
    assert "has no object of seldom, rare" in said
    assert "fold3/train" in said  # no part is empty


def test_the_grid_is_one_of_ablate(split, tmp_path: Path) -> None:
    config = config_path("co_detr_small")
    _, said = split(made_up(), "--folds", "2", "--config-file", config, "--images", "my images")
    grid = read_grid_file(str(tmp_path / "out" / "grid.yaml"))
    assert [variant.slug for variant in grid.variants] == ["fold1", "fold2"]
    cfg = load_config(grid.variants[1].config, grid.variants[1].overrides)
    assert cfg.data.val == str(tmp_path / "out" / "fold2" / "val.json")
    assert cfg.data.train_images == "my images"
    assert "output/out/fold2/seed0/coco_instances_results.json --folds" in said
    assert yaml.safe_load((tmp_path / "out" / "grid.yaml").read_text())["config"] == config


def nameless(content: dict) -> None:
    del content["images"][3]["camera"]


def twice(content: dict) -> None:
    content["images"][1]["id"] = content["images"][0]["id"]


def elsewhere(content: dict) -> None:
    content["annotations"][0] |= {"image_id": 999, "iscrowd": 1}


@pytest.mark.parametrize(
    ("flags", "change", "message"),
    [
        (["--folds", "1"], None, "--folds 1 must be at least 2"),
        (["--folds", "121"], None, "120 groups of images for 121 parts"),
        (["--val", "1.5"], None, "--val 1.5 must be between 0 and 1"),
        (["--folds", "2", "--group-by", "video"], None, "has no 'video' to be grouped by"),
        (["--folds", "2", "--group-by", "camera"], nameless, "clip0_4.jpg of"),
        (["--folds", "2", "--group-pattern", "a"], None, "--group-pattern needs --group-by"),
        (["--folds", "2", "--group-by", "camera", "--group-pattern", "("], None, "no regular"),
        (["--folds", "2", "--group-by", "camera", "--group-pattern", "a"], None, "has no (...)"),
        (["--folds", "2", "--group-by", "camera", "--group-pattern", "(x)"], None, "does not fit"),
        (["--folds", "2"], twice, "has the id 1, which"),
        (["--folds", "2"], elsewhere, "image_id 999"),
        (["--folds", "2", "--images", "a"], None, "make grid.yaml together"),
        (["--val", ".2", "--images", "a"], None, "are for --folds"),
    ],
)
def test_mistakes(split, flags: list[str], change, message: str) -> None:
    content = made_up()
    if change is not None:
        change(content)
    status, said = split(content, *flags)
    assert status == 2 and message in said
    assert said.count("\n") == 1
