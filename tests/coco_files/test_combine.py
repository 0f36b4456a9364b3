"""tools/combine.py: laws of merging, choices on one part and reports on the other, mistakes."""

import json
import math
from pathlib import Path

import pytest

from benchmarks.evaluation import by_pycocotools, evaluator_of
from co_detr.data.segmentation import encoded_mask
from co_detr.errors import exit_code
from co_detr.tools.combine import RULES
from co_detr.tools.combine.command_line import parse_arguments, run
from co_detr.tools.combine.fusing import scaled_score
from tests.coco_files.detections import apart, found_by, write, write_truth
from tests.engine.masked import add_masks, ellipse


class Tool:
    """Runs the tool in a folder that has a ground truth."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.truth, self.truth_file = write_truth(folder)
        self._capsys = capsys

    def __call__(self, *arguments: object, labeled: bool = False) -> tuple[int, str]:
        words = [*map(str, arguments), "--output", str(self.folder / "out.json")]
        words += ["--annotations", str(self.truth_file)] * labeled
        status = exit_code(lambda: run(parse_arguments(words)))
        said = self._capsys.readouterr()
        return status, said.out + said.err

    @property
    def result(self) -> list[dict]:
        return json.loads((self.folder / "out.json").read_text())

    def file(self, name: str, entries: object) -> str:
        return write(self.folder / name, entries)


@pytest.fixture
def tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(tmp_path, capsys)


def ordered(entries: list[dict]) -> list[dict]:
    return sorted(entries, key=lambda entry: (entry["image_id"], -entry["score"], entry["bbox"]))


def test_one_file_comes_out_as_it_went_in(tool: Tool) -> None:
    entries = found_by(tool.truth, 1)
    status, said = tool(tool.file("a.json", entries))
    assert status == 0 and "one source: nothing to fuse" in said
    assert tool.result == entries


@pytest.mark.parametrize("rule", ["nms", "soft-nms"])
def test_a_file_with_itself_is_itself(tool: Tool, rule: str) -> None:
    """Exactly, where no two boxes of a class overlap by the threshold."""
    entries = apart(1, [0.9, 0.123456789, 0.3]) + apart(1, [0.8, 0.7], 2) + apart(2, [0.5])
    a = tool.file("a.json", entries)
    assert tool(a, a, "--rule", rule)[0] == 0
    assert ordered(tool.result) == ordered(entries)


@pytest.mark.parametrize("rule", ["wbf", "wbf-max"])
def test_a_file_with_itself_is_itself_but_for_rounding(tool: Tool, rule: str) -> None:
    entries = apart(1, [0.9, 0.123456789, 0.3]) + apart(2, [0.5])
    a = tool.file("a.json", entries)
    assert tool(a, a, "--rule", rule)[0] == 0
    for own, other in zip(ordered(tool.result), ordered(entries), strict=True):
        assert own["score"] == pytest.approx(other["score"], abs=1e-6)
        assert own["bbox"] == pytest.approx(other["bbox"], abs=1e-4)
        assert own["category_id"] == other["category_id"]


def test_nms_of_a_fused_file_with_itself_changes_nothing(tool: Tool) -> None:
    a, b = (tool.file(f"{n}.json", found_by(tool.truth, n)) for n in (1, 2))
    tool(a, b, "--rule", "nms")
    once = tool.result
    c = tool.file("c.json", once)
    tool(c, c, "--rule", "nms")
    assert ordered(tool.result) == ordered(once)


def test_agreement_is_worth_something(tool: Tool) -> None:
    box = {"image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 40]}
    a = tool.file("a.json", [box | {"score": 0.8}])
    b = tool.file("b.json", [box | {"score": 0.4, "bbox": [12, 10, 40, 40]}])
    alone = tool.file("alone.json", [box | {"score": 0.8}, *apart(2, [0.1])])
    tool(a, b, "--rule", "wbf")
    (both,) = tool.result
    assert both["score"] == pytest.approx(0.6) and 10 < both["bbox"][0] < 11
    tool(a, b, "--rule", "wbf", "--weights", "3", "1")
    assert tool.result[0]["score"] == pytest.approx(2 * (3 * 0.8 + 0.4) / 2 / 4)
    c = tool.file("c.json", apart(2, [0.1]))
    tool(alone, c, "--rule", "wbf", "--allow-missing-images")
    assert tool.result[0]["score"] == pytest.approx(0.4)  # one of two files has it


def test_temperature_goes_through_the_logit(tool: Tool) -> None:
    assert scaled_score(0.8, 1.0) == pytest.approx(0.8)
    assert scaled_score(0.8, 2.0) == pytest.approx(1 / (1 + math.exp(-math.log(4) / 2)))
    assert (scaled_score(0.0, 3.0), scaled_score(1.0, 3.0)) == (0.0, 1.0)
    a = tool.file("a.json", apart(1, [0.8, 0.5]))
    assert "nothing to fuse --temperatures 2)" in tool(a, "--temperatures", "2")[1]
    assert [e["score"] for e in tool.result] == pytest.approx([2 / 3, 0.5])


def test_the_temperature_of_sure_mistakes_is_above_1(tool: Tool) -> None:
    sure = [entry | {"score": 0.5 + 0.499 * entry["score"]} for entry in found_by(tool.truth, 1)]
    _, said = tool(tool.file("a.json", sure), "--temperatures", "fit", labeled=True)
    assert float(said.split("Temperatures: ")[1].split("\n")[0]) > 1.5
    assert "CHOSEN ON THE IMAGES THAT ARE REPORTED ON: --temperatures fit" in said


def ap_of(said: str, row: str) -> float:
    line = next(line for line in said.splitlines() if line.startswith(f"| {row} "))
    return float(line.split("|")[2])


def test_ap_is_that_of_the_evaluation(tool: Tool) -> None:
    entries = found_by(tool.truth, 1)
    a, b, c = (tool.file(f"{n}.json", found_by(tool.truth, n)) for n in (1, 2, 3))
    status, said = tool(a, b, c, "--leave-one-out", labeled=True)
    assert status == 0 and "No setting was chosen here" in said
    expected = evaluator_of(str(tool.truth_file), tool.truth).judge(entries)["AP"]
    assert ap_of(said, a) == pytest.approx(expected, abs=0.005)
    combined = by_pycocotools(str(tool.truth_file), tool.result)["AP"]
    assert ap_of(said, "combined") == pytest.approx(combined, abs=0.005)
    _, pair = tool(a, c, labeled=True)
    assert ap_of(said, f"without {b}") == ap_of(pair, "combined")


def test_the_last_one_left_out_leaves_the_rule_alone(tool: Tool) -> None:
    """Soft-NMS of one model can gain what two models seem to gain."""
    a, b = (tool.file(f"{n}.json", found_by(tool.truth, n)) for n in (1, 2))
    _, said = tool(a, b, "--rule", "nms", "--leave-one-out", labeled=True)
    _, twice = tool(a, a, "--rule", "nms", labeled=True)  # a better copy of all suppresses nothing
    assert ap_of(said, f"without {b}") == ap_of(twice, "combined") != ap_of(said, a)


def test_a_sweep_chooses_on_one_half_and_reports_on_the_other(tool: Tool, monkeypatch) -> None:
    monkeypatch.setattr("co_detr.tools.combine.choosing.SWEPT_IOUS", (0.6,))
    a, b = (tool.file(f"{n}.json", found_by(tool.truth, n, per_image=8)) for n in (1, 2))
    _, said = tool(a, b, "--sweep", "--tune-on", "half", labeled=True)
    assert f"The best of {len(RULES) * 3} settings, by AP on 6 images" in said
    assert "On 6 images of" in said and "Chosen on 6 other images: --sweep." in said
    _, said = tool(a, b, "--sweep", labeled=True)
    assert "CHOSEN ON THE IMAGES THAT ARE REPORTED ON: --sweep" in said
    rows = [line.split("|")[1:-1] for line in said.splitlines() if line.startswith("| ")]
    rule, iou, weights, ap = (cell.strip() for cell in rows[1])
    assert float(ap) == max(float(row[3]) for row in rows[1:13])
    assert ap_of(said, "combined") == float(ap)
    _, fixed = tool(
        *(a, b, "--rule", rule, "--iou", iou, "--weights", *weights.split()), labeled=True
    )
    assert ap_of(fixed, "combined") == float(ap)


def test_images_to_choose_by_are_named(tool: Tool) -> None:
    a = tool.file("a.json", found_by(tool.truth, 1))
    ids = tool.file("ids.json", [1, 2, 3])
    flags = ["--temperatures", "fit", "--tune-on"]
    assert "Chosen on 3 other images: --temp" in tool(a, *flags, ids, labeled=True)[1]
    part = tool.truth | {"images": tool.truth["images"][:4]}
    part_file = tool.file("part.json", part)
    assert "On 8 images of" in tool(a, *flags, part_file, labeled=True)[1]
    assert "unknown ids ('x')" in tool(a, *flags, tool.file("i", ["x"]), labeled=True)[1]
    all_ids = tool.file("i", list(range(1, 13)))
    assert "has all images" in tool(a, *flags, all_ids, labeled=True)[1]
    assert "no list of image ids" in tool(a, *flags, tool.file("i", {}), labeled=True)[1]


def test_thresholds_are_the_best_and_are_applied(tool: Tool) -> None:
    truth = {
        "images": [{"id": 1, "width": 640, "height": 480, "file_name": "1.jpg"}],
        "annotations": [
            {"id": n + 1, "iscrowd": int(n == 3), "area": 900, **entry}
            for n, entry in enumerate(apart(1, [1, 1, 1, 1]))
        ],
        "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "bus"}],
    }
    tool.truth_file.write_text(json.dumps(truth))
    # Right, right, in a crowd, wrong, right: best without the last two.
    found = apart(1, [0.9, 0.6, 0.2, 0.5])
    wrong = [found[0] | {"bbox": [500, 300, 50, 50], "score": score} for score in (0.4, 0.3, 0.25)]
    a = tool.file("a.json", found + wrong)
    path = tool.folder / "thresholds.json"
    _, said = tool(a, "--find-thresholds", path, labeled=True)
    assert json.loads(path.read_text()) == {"car": 0.6}
    assert "| car     | 0.600       | 80.0 | 100.0       | 66.7     |" in said
    assert "no threshold: bus" in said and "REPORTED ON: --find-thresholds" in said
    assert len(tool.result) == 7
    tool(a, "--thresholds", path, labeled=True)
    assert [entry["score"] for entry in tool.result] == [0.9, 0.6]
    bad = tool.file("bad.json", {"cat": 0.5})
    assert "has the classes cat, which" in tool(a, "--thresholds", bad, labeled=True)[1]
    assert "needs names of classes" in tool(a, "--thresholds", path)[1]
    worse = tool.file("bad.json", {"car": 5})
    assert "has no thresholds" in tool(a, "--thresholds", worse, labeled=True)[1]


def test_folds_are_joined_and_judged_together(tool: Tool) -> None:
    entries = found_by(tool.truth, 1)
    parts = [[e for e in entries if e["image_id"] % 3 == n] for n in range(3)]
    files = [tool.file(f"{n}.json", part) for n, part in enumerate(parts)]
    status, said = tool(*files, "--folds", labeled=True)
    assert status == 0 and tool.result == [entry for part in parts for entry in part]
    expected = by_pycocotools(str(tool.truth_file), entries)["AP"]
    assert ap_of(said, "3 folds") == pytest.approx(expected, abs=0.005)
    assert "has a detection in 4 images" in tool(*files[:2], "--folds", labeled=True)[1]
    assert "folds have no image in common" in tool(files[0], *files, "--folds", labeled=True)[1]


def test_masks_stay_with_their_boxes(tool: Tool) -> None:
    add_masks(tool.truth["annotations"])
    tool.truth_file.write_text(json.dumps(tool.truth))
    lists = []
    for seed in (1, 2):
        entries = found_by(tool.truth, seed, per_image=4)
        for entry in entries:
            mask = encoded_mask([ellipse(entry["bbox"])], 640, 640)
            entry["segmentation"] = mask | {"counts": mask["counts"].decode()}
            entry["mask_score"] = entry["score"] / 2
        lists.append(entries)
    a, b = (tool.file(f"{n}.json", entries) for n, entries in enumerate(lists))
    _, said = tool(a, b, "--rule", "nms", labeled=True)
    assert "segm/AP" in said
    boxes = [{k: v for k, v in e.items() if k != "segmentation"} for e in tool.result]
    expected = by_pycocotools(str(tool.truth_file), boxes)["AP"]
    assert ap_of(said, "combined") == pytest.approx(expected, abs=0.005)
    masks = [{k: v for k, v in e.items() if k != "bbox"} for e in tool.result]
    masks = [e | {"score": e["mask_score"]} for e in masks]
    expected = by_pycocotools(str(tool.truth_file), masks, "segm")["AP"]
    row = next(line for line in said.splitlines() if line.startswith("| combined "))
    assert float(row.split("|")[5]) == pytest.approx(expected, abs=0.005)
    assert len(tool.result) > 4
    assert all(entry in lists[0] + lists[1] for entry in tool.result)
    tool(a, b, "--rule", "nms", "--weights", "1", "2", "--per-image", "3")
    halved = next(e for e in tool.result if e not in lists[0] + lists[1])
    assert halved["mask_score"] == pytest.approx(halved["score"] / 2)
    assert len(tool.result) <= 3 * 12
    assert "has masks, and wbf averages boxes" in tool(a, b, "--rule", "wbf")[1]
    tool(a)  # alone, nothing is averaged
    assert tool.result == lists[0]


def test_predictions_are_known_by_their_names(tool: Tool) -> None:
    entries = found_by(tool.truth, 1)
    images = [
        image | {"id": 100 + image["id"], "file_name": f"photos/{image['file_name']}"}
        for image in reversed(tool.truth["images"])
    ]
    numbers = {1: 3, 2: 2, 3: 1}
    categories = [{"id": n, "name": f"class {key}"} for key, n in numbers.items()]
    annotations = [
        {"id": n, "area": 1, "iscrowd": 0}
        | entry
        | {"image_id": 100 + entry["image_id"], "category_id": numbers[entry["category_id"]]}
        for n, entry in enumerate(entries)
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    predictions = tool.file("predictions.json", content)
    assert tool(predictions, labeled=True)[0] == 0
    assert tool.result == entries
    assert tool(predictions)[0] == 0  # the file itself has the images
    assert tool.result[0]["image_id"] == 101
    content["images"][0]["file_name"] = "other.jpg"
    assert "no image of that name" in tool(tool.file("p.json", content), labeled=True)[1]
    content["categories"][0]["name"] = "cat"
    said = tool(tool.file("p.json", content | {"images": images[1:]}), labeled=True)[1]
    assert "has the classes cat" in said


GOOD = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 40], "score": 0.5}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([GOOD | {"image_id": 77}], "of image_id 77, which"),
        ([GOOD | {"category_id": 9}], "of category_id 9, which"),
        ([{k: v for k, v in GOOD.items() if k != "score"}], "has no score: write it again"),
        ([GOOD, GOOD | {"bbox": [1, math.nan, 3, 4]}], "detection 1 of"),
        ([GOOD | {"bbox": [1, 2, -3, 4]}], "not four finite numbers"),
        ([GOOD | {"score": 7}], "has the score 7"),
        ([3], "needs image_id"),
        ({"a": 1}, "is no file of detections"),
        ([GOOD], "has no detection in 11 images of"),
    ],
)
def test_files_that_are_wrong(tool: Tool, content: object, message: str) -> None:
    a = tool.file("a.json", found_by(tool.truth, 1))
    status, said = tool(a, tool.file("b.json", content), labeled=True)
    assert status == 2 and message in said and said.count("\n") == 1
    assert not (tool.folder / "out.json").exists()


def test_an_input_is_not_replaced(tool: Tool) -> None:
    entries = found_by(tool.truth, 1, per_image=1)
    path = tool.file("out.json", entries)
    assert "would replace its own input" in tool(path)[1]
    assert tool.result == entries


def test_ground_truth_that_is_wrong(tool: Tool) -> None:
    a = tool.file("a.json", found_by(tool.truth, 1))
    damaged = tool.truth["annotations"][0]
    number, damaged["image_id"] = damaged["image_id"], 99
    tool.truth_file.write_text(json.dumps(tool.truth))
    status, said = tool(a, labeled=True)
    assert status == 2 and "annotations of an image_id that is not in 'images'" in said
    damaged |= {"image_id": number, "bbox": "1 2 3 4"}
    tool.truth_file.write_text(json.dumps(tool.truth))
    assert tool(a, labeled=True)[0] == 2
    tool.truth["annotations"].clear()  # a test set
    tool.truth_file.write_text(json.dumps(tool.truth))
    assert tool(a, labeled=True)[0] == 0
    assert (
        "no annotations to choose or to judge by"
        in tool(*(a, "--temperatures", "fit"), labeled=True)[1]
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sweep"], "--sweep needs ground truth"),
        (["--folds"], "--folds needs ground truth"),
        (["--weights", "1"], "--weights has 1 numbers for 2 files"),
        (["--weights", "1", "0"], "all must be above 0"),
        (["--temperatures", "1", "x"], "a number for each file, or fit"),
        (["--temperatures", "1", "-1"], "all must be above 0"),
        (["--iou", "0"], "must be above 0"),
        (["--per-image", "0"], "must be at least 1"),
        (["--annotations", "TRUTH", "--tune-on", "half"], "--tune-on is for --sweep"),
        (["--annotations", "TRUTH", "--folds", "--sweep"], "it fuses nothing"),
    ],
)
def test_mistakes(tool: Tool, flags: list[str], message: str) -> None:
    a = tool.file("a.json", found_by(tool.truth, 1, per_image=1))
    flags = [str(tool.truth_file) if flag == "TRUTH" else flag for flag in flags]
    status, said = tool(a, a, *flags)
    assert status == 2 and message in said and said.count("\n") == 1
