"""tools/pseudo_label.py: bands of scores, classes, own labels, and what a training reads of it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from co_detr.data.coco import load_coco
from co_detr.data.preflight import SplitFiles, preflight
from co_detr.data.segmentation import encoded_mask
from co_detr.errors import exit_code
from co_detr.tools.pseudo_label import parse_arguments, run
from tests.coco_files.detections import apart, write

NAMES = ("car", "truck", "person")


def unlabeled(images: int = 3) -> dict:
    return {
        "images": [
            {"id": n, "file_name": f"{n}.png", "width": 320, "height": 240}
            for n in range(1, images + 1)
        ],
        "categories": [{"id": n, "name": name} for n, name in enumerate(NAMES, start=1)],
    }


class Tool:
    """Runs the tool on detections of three images."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.images = write(folder / "unlabeled.json", unlabeled())
        self._capsys = capsys

    def __call__(self, *lists: object, flags: tuple[object, ...] = ()) -> tuple[int, str]:
        files = [self.file(f"found{n}.json", entries) for n, entries in enumerate(lists)]
        words = [*files, "--annotations", self.images, "--output", str(self.folder / "out.json")]
        status = exit_code(lambda: run(parse_arguments([*words, *map(str, flags)])))
        said = self._capsys.readouterr()
        return status, said.out + said.err

    def file(self, name: str, content: object) -> str:
        return write(self.folder / name, content)

    @property
    def result(self) -> dict:
        return json.loads((self.folder / "out.json").read_text())

    @property
    def annotations(self) -> list[dict]:
        return self.result["annotations"]

    @property
    def image_ids(self) -> list:
        return [image["id"] for image in self.result["images"]]


@pytest.fixture
def tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(tmp_path, capsys)


def found(image: int, category: int, score: float, box: list[float], **more: object) -> dict:
    return {"image_id": image, "category_id": category, "score": score, "bbox": box} | more


def test_bands_of_scores(tool: Tool) -> None:
    entries = apart(1, [0.9, 0.5, 0.4, 0.1]) + apart(2, [0.3])
    tool(entries)
    assert [(a["score"], a["iscrowd"]) for a in tool.annotations] == [(0.9, 0), (0.5, 0)]
    assert tool.image_ids == [1]
    tool(entries, flags=("--keep-empty",))
    assert tool.image_ids == [1, 2, 3]
    _, said = tool(entries, flags=("--uncertain", 0.3))
    assert [a["iscrowd"] for a in tool.annotations] == [0, 0, 1]
    assert "a training learns nothing there, as from background" in said
    assert "2 images without a label are left out" in said
    _, said = tool(entries + apart(3, [0.8]), flags=("--uncertain", 0.3, "--skip-uncertain"))
    assert tool.image_ids == [3] and "2 images with uncertain objects are left out" in said


def test_thresholds_of_classes(tool: Tool) -> None:
    thresholds = tool.file("thresholds.json", {"car": 0.3, "truck": 0.95})
    entries = apart(1, [0.35]) + apart(2, [0.9], category=2) + apart(3, [0.6, 0.4], category=3)
    tool(entries, flags=("--thresholds", thresholds))
    assert [(a["category_id"], a["score"]) for a in tool.annotations] == [(1, 0.35), (3, 0.6)]


def test_provenance(tool: Tool) -> None:
    tool(apart(1, [0.9]), apart(2, [0.8]))
    assert [Path(a["source"]).name for a in tool.annotations] == ["found0.json", "found1.json"]
    assert [a["id"] for a in tool.annotations] == [1, 2]


def test_classes_are_folded_and_dropped_by_name(tool: Tool) -> None:
    entries = [*apart(1, [0.9]), *apart(2, [0.8], 2), *apart(3, [0.7], 3)]
    tool(entries, flags=("--classes", "truck=vehicle", "car=vehicle"))
    assert tool.result["categories"] == [{"id": 1, "name": "vehicle"}]
    assert [(a["image_id"], a["category_id"]) for a in tool.annotations] == [(1, 1), (2, 1)]


def test_nms_within_classes_and_groups(tool: Tool) -> None:
    box = [10, 10, 100, 80]
    entries = [found(1, 1, 0.8, box), found(1, 2, 0.9, box), found(1, 3, 0.7, box)]
    same = [found(1, 1, 0.6, [11, 10, 100, 80])]
    tool(entries, same)
    assert [a["category_id"] for a in tool.annotations] == [2, 1, 3]
    _, said = tool(entries, same, flags=("--groups", "car,truck"))
    assert [a["category_id"] for a in tool.annotations] == [2, 3]
    assert "| car     |        0 |           0 |         0 |     2 |" in said
    tool(entries, same, flags=("--nms", 1))
    assert len(tool.annotations) == 4


def test_own_labels_win(tool: Tool) -> None:
    """Also in crowd regions, and whatever the class; ids of the user's file stay."""
    own = unlabeled(2)
    own["images"] = [i | {"id": i["id"] + 1} for i in own["images"]]  # 2 is the other file's 1
    own["images"].append({"id": 9, "file_name": "own.png", "width": 320, "height": 240})
    own["categories"] = [{"id": 50 + n, "name": name} for n, name in enumerate(NAMES)]
    own["annotations"] = [
        {"id": 7, "image_id": 2, "category_id": 50, "bbox": [10, 10, 50, 50], "note": "mine"},
        {"id": 8, "image_id": 2, "category_id": 52, "bbox": [150, 0, 150, 200], "iscrowd": 1},
    ]
    entries = [
        found(1, 2, 0.9, [12, 10, 50, 50]),
        found(1, 1, 0.9, [200, 50, 30, 30]),  # in the crowd
        found(1, 1, 0.9, [20, 120, 60, 60]),
        found(3, 1, 0.9, [20, 120, 60, 60]),
    ]
    _, said = tool(entries, flags=("--labels", tool.file("own.json", own)))
    result = tool.result
    assert [a.get("note") for a in result["annotations"]] == ["mine", None, None, None]
    assert result["categories"] == own["categories"]
    new_id = next(image["id"] for image in result["images"] if image["file_name"] == "3.png")
    assert [(a["image_id"], a["category_id"]) for a in result["annotations"][2:]] == [
        (2, 50),
        (new_id, 50),
    ]
    assert len(set(tool.image_ids)) == 4 and {2, 3, 9} < set(tool.image_ids)
    assert "| truck   |        0 |           0 |         0 |     0 |                 1 |" in said
    # Their images stay, whatever the tool leaves out.
    tool([], flags=("--labels", tool.file("own.json", own), "--skip-uncertain"))
    assert tool.image_ids == [2, 3, 9]


def test_ids_of_text_and_numbers_are_not_mixed(tool: Tool) -> None:
    own = unlabeled(1)
    own["images"][0] |= {"id": "a", "file_name": "own.png"}
    own["annotations"] = []
    tool(apart(1, [0.9]), flags=("--labels", tool.file("own.json", own)))
    assert tool.image_ids == ["a", "pseudo 1"]


def test_a_training_reads_it_as_any_set(tool: Tool, tmp_path: Path) -> None:
    mask = encoded_mask([[20, 20, 90, 20, 90, 70, 20, 70]], 240, 320)
    mask |= {"counts": mask["counts"].decode()}
    entries = [
        found(1, 1, 0.9, [20, 20, 70, 50], segmentation=mask),
        found(1, 2, 0.3, [200, 100, 70, 50], segmentation=mask),
        found(2, 3, 0.8, [300, 200, 60, 60]),  # reaches out of the image
        found(2, 3, 0.8, [400, 200, 60, 60]),  # lies outside
    ]
    _, said = tool(entries, flags=("--uncertain", 0.2))
    assert "1 boxes are outside their image: left out" in said
    for number in (1, 2):
        pixels = np.zeros((240, 320, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    path = str(tool.folder / "out.json")
    report = preflight([SplitFiles("train", path, str(tmp_path), masks=True)])
    report.raise_on_errors()
    assert (report.splits[0].boxes, report.splits[0].crowd) == (2, 1)
    first, second = load_coco(path, str(tmp_path), 3, with_masks=True)
    assert [a["iscrowd"] for a in first["annotations"]] == [0, 1]
    assert "segmentation" in first["annotations"][0]
    assert second["annotations"][0]["bbox"] == [300, 200, 20, 40]
    assert tool.annotations[0]["area"] == 70 * 50


def test_predictions_bring_their_images(tool: Tool, capsys) -> None:
    content = unlabeled() | {"annotations": apart(2, [0.9])}
    arguments = [tool.file("predictions.json", content), "--output", str(tool.folder / "out.json")]
    assert exit_code(lambda: run(parse_arguments(arguments))) == 0
    assert tool.image_ids == [2]
    arguments[0] = tool.file("results.json", apart(2, [0.9]))
    capsys.readouterr()
    assert exit_code(lambda: run(parse_arguments(arguments))) == 2
    assert "add --annotations with the json that was evaluated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--score", 0), "--score 0 must be above 0"),
        (("--uncertain", 0.6), "--uncertain 0.6 must be below --score 0.5"),
        (("--classes", "bus"), "--classes names bus, which"),
        (("--groups", "car,bus"), "--groups names bus"),
        (("--groups", "car,truck", "car,person"), "--groups names car"),
        (("--labels", "OTHER"), "does not have the classes car, truck"),
        (("--labels", "BAD"), "has the bbox None"),
        (("--labels", "LOST"), "has the image_id 99, which none of its images has"),
    ],
)
def test_mistakes(tool: Tool, flags: tuple, message: str) -> None:
    other = unlabeled() | {"annotations": [], "categories": [{"id": 1, "name": "person"}]}
    bad = unlabeled() | {"annotations": [{"id": 1, "image_id": 1, "category_id": 1}]}
    lost = unlabeled() | {"annotations": [{"id": 1, "image_id": 99, "category_id": 1}]}
    files = {"OTHER": tool.file("other.json", other), "BAD": tool.file("bad.json", bad)}
    files["LOST"] = tool.file("lost.json", lost)
    status, said = tool(apart(1, [0.9]), flags=tuple(files.get(flag, flag) for flag in flags))
    assert status == 2 and message in said and said.count("\n") == 1


def test_images_without_categories_or_sizes(tool: Tool) -> None:
    nameless = unlabeled()
    nameless["categories"] = []
    tool.images = tool.file("nameless.json", nameless)
    assert "has no categories, so that" in tool([])[1]
    sizeless = unlabeled()
    del sizeless["images"][1]["width"]
    tool.images = tool.file("sizeless.json", sizeless)
    assert "image id 2 of" in tool(apart(1, [0.9]))[1]
