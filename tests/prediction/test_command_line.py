"""predict.py: files in, pictures and a json out; what cannot be read is listed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from co_detr.data.images import image_suffixes
from co_detr.errors import ConfigError, DataError
from co_detr.tools.predict.command_line import parse_arguments, run
from co_detr.tools.predict.inputs import find_inputs
from co_detr.tools.predict.predictor import Predictor
from tests.device import CHILD, NAME
from tests.paths import python_path
from tests.prediction.trained_run import CLASSES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def predict(trained, tmp_path):
    """Runs the command line in this process; returns its exit status and what it wrote."""

    def call(*arguments: str, output: str = "drawn"):
        options = ["--config-file", trained.config, "--checkpoint", trained.checkpoint]
        options += ["--device", NAME, "--output", str(tmp_path / output)]
        status = run(parse_arguments([*options, *map(str, arguments)]))
        return status, json.loads((tmp_path / output / "predictions.json").read_text())

    return call


def pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.jpg"))


def test_json_and_pictures(predict, predictor, photos, tmp_path):
    status, content = predict(photos, "--score", "0")
    assert status == 0
    assert pictures(tmp_path / "drawn") == ["a.jpg", "b.jpg", "c.jpg"]
    assert content["categories"] == [
        {"id": index + 1, "name": name} for index, name in enumerate(CLASSES)
    ]
    assert [image["id"] for image in content["images"]] == [1, 2, 3]
    for image in content["images"]:
        found = predictor(image["file_name"])
        assert (image["height"], image["width"]) == found.image_size
        mine = [
            annotation
            for annotation in content["annotations"]
            if annotation["image_id"] == image["id"]
        ]
        boxes = found.pred_boxes.tensor.clone()
        boxes[:, 2:] -= boxes[:, :2]
        assert len(mine) == len(found) > 0
        assert [annotation["bbox"] for annotation in mine] == boxes.tolist()
        assert [annotation["score"] for annotation in mine] == found.scores.tolist()
        assert [annotation["category_id"] - 1 for annotation in mine] == found.pred_classes.tolist()
        with Image.open(tmp_path / "drawn" / image["picture"]) as picture:
            assert picture.size == (image["width"], image["height"])


def test_another_detector(predict, trained, photos):
    _, content = predict(photos, "--score", "0", "--detector", "cascade")
    predictor = Predictor(trained.config, trained.checkpoint, device=NAME, detector="cascade")
    for image in content["images"]:
        found = predictor(image["file_name"])
        mine = [
            annotation
            for annotation in content["annotations"]
            if annotation["image_id"] == image["id"]
        ]
        assert [annotation["score"] for annotation in mine] == found.scores.tolist() != []


def test_json_is_an_annotation_file(predict, photos, tmp_path):
    _, content = predict(photos, "--score", "0")
    coco = COCO(str(tmp_path / "drawn" / "predictions.json"))
    assert len(coco.getAnnIds(imgIds=[1])) == sum(
        annotation["image_id"] == 1 for annotation in content["annotations"]
    )
    assert len(coco.loadRes(content["annotations"]).anns) == len(content["annotations"])


def test_batched_is_single(predict, photos):
    _, single = predict(photos, "--score", "0")
    _, batched = predict(photos, "--score", "0", "--batch-size", "2", output="batched")
    assert [image["file_name"] for image in single["images"]] == [
        image["file_name"] for image in batched["images"]
    ]
    for one, other in zip(single["annotations"], batched["annotations"], strict=True):
        assert (one["image_id"], one["category_id"]) == (other["image_id"], other["category_id"])
        np.testing.assert_allclose(one["bbox"], other["bbox"], atol=1e-3)


def test_score(predict, photos):
    _, everything = predict(photos, "--score", "0")
    scores = sorted(annotation["score"] for annotation in everything["annotations"])
    limit = scores[len(scores) // 2]
    _, some = predict(photos, "--score", str(limit))
    kept = [annotation["score"] for annotation in some["annotations"]]
    assert sorted(kept) == [score for score in scores if score >= limit] and kept
    _, default = predict(photos)
    assert len(default["annotations"]) == sum(score >= 0.3 for score in scores)


def test_unreadable_files_are_listed_and_the_others_done(predict, photos, tmp_path, capsys):
    (photos / "b.png").rename(photos / "b.jpg")
    (photos / "b.jpg").write_bytes((photos / "a.png").read_bytes()[:60])
    status, content = predict(photos, photos / "nowhere.png")
    assert status == 1
    assert [Path(image["file_name"]).name for image in content["images"]] == ["a.png", "c.png"]
    assert [image["id"] for image in content["images"]] == [1, 3]
    assert pictures(tmp_path / "drawn") == ["a.jpg", "c.jpg"]
    printed = capsys.readouterr()
    assert "Detections of 2 images are in" in printed.out
    assert "2 could not be read:\n" in printed.err
    assert f"  {photos / 'nowhere.png'} does not exist.\n" in printed.err
    assert f"  image {photos / 'b.jpg'} cannot be decoded" in printed.err


def test_an_interrupted_run_keeps_what_was_done(predict, photos, tmp_path, monkeypatch):
    prepare = Predictor.prepare

    def interrupted(self, image):
        if Path(image).name == "b.png":
            raise KeyboardInterrupt
        return prepare(self, image)

    monkeypatch.setattr(Predictor, "prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(photos)
    content = json.loads((tmp_path / "drawn" / "predictions.json").read_text())
    assert [Path(image["file_name"]).name for image in content["images"]] == ["a.png"]


def test_images_of_the_same_name_get_pictures_of_their_own(predict, photos, tmp_path):
    (photos / "more").mkdir()
    Image.open(photos / "a.png").save(photos / "more" / "A.bmp")
    _, content = predict(photos)
    assert pictures(tmp_path / "drawn") == ["A_2.jpg", "a.jpg", "b.jpg", "c.jpg"]
    assert [image["picture"] for image in content["images"]][-1] == "A_2.jpg"


def test_inputs(photos, tmp_path):
    (photos / "sub").mkdir()
    for name in ("sub/D.JPG", "notes.txt", ".hidden.png", "sub/._D.jpg", "odd[1].png"):
        (photos / name).touch()
    (photos / "drawn").mkdir()
    (photos / "drawn" / "a.jpg").touch()

    def names(*arguments):
        found = find_inputs(
            [str(argument) for argument in arguments], image_suffixes(), photos / "drawn"
        )
        return [str(path.relative_to(photos)) for path in found.files], found.problems

    assert names(photos) == (["a.png", "b.png", "c.png", "odd[1].png", "sub/D.JPG"], [])
    assert names(photos / "[bc].*") == (["b.png", "c.png"], [])
    assert names(photos / "**" / "*.JPG") == (["sub/D.JPG"], [])
    assert names(photos / "odd[1].png") == (["odd[1].png"], [])
    assert names(photos / "notes.txt") == (["notes.txt"], [])
    assert names(photos / "c.png", photos / "?.png")[0] == ["c.png", "a.png", "b.png"]
    files, problems = names(photos / "a.png", photos / "*.webp", tmp_path / "nowhere")
    assert files == ["a.png"]
    assert problems == [
        f"no file of a kind that is read matches {photos / '*.webp'}.",
        f"{tmp_path / 'nowhere'} does not exist.",
    ]


def test_the_files_of_a_folder_are_not_compared_with_each_other(tmp_path, monkeypatch):
    for number in range(60):
        (tmp_path / f"{number}.jpg").touch()
        (tmp_path / f"{number}.txt").touch()
    equal, compared = Path.__eq__, []
    monkeypatch.setattr(Path, "__eq__", lambda *paths: compared.append(1) or equal(*paths))
    found = find_inputs([str(tmp_path)], image_suffixes(), tmp_path / "drawn")
    assert len(found.files) == len(found.passed_over) == 60
    assert len(compared) < 20 * 120


def test_files_that_are_passed_over_are_listed(predict, photos, tmp_path, capsys):
    pixels = np.zeros((60, 80, 3), np.uint8)
    for name in ("d.JP2", "e.Mpo", "f.JFIF", "g.TIF", "h.webp"):
        Image.fromarray(pixels).save(photos / name, "MPO" if name == "e.Mpo" else None)
    for name in ("i.HEIC", "j.eps", "notes.txt", "k.mp4"):
        (photos / name).touch()
    status, content = predict(photos)
    assert status == 0 and len(content["images"]) == 8
    said = [line for line in capsys.readouterr().err.splitlines() if "Passed over" in line]
    assert said == [
        "Passed over 4 files (i.HEIC, j.eps, k.mp4, notes.txt) of kinds that are not read; images "
        "among them have to be converted, for example to JPEG."
    ]
    only = tmp_path / "only"
    only.mkdir()
    for number in range(10):
        (only / f"{number}.heic").touch()
    with pytest.raises(DataError, match=r"kind that is read, only 10 files \(0.heic, .* 2 more\)"):
        find_inputs([str(only)], image_suffixes(), tmp_path / "drawn")


def test_no_inputs(tmp_path):
    with pytest.raises(DataError, match="nothing to read: the folder .* has no file of a kind"):
        find_inputs([str(tmp_path)], image_suffixes(), tmp_path / "drawn")
    with pytest.raises(DataError, match="nothing to read: no file of a kind that is read matches"):
        find_inputs([str(tmp_path / "*.jpg")], image_suffixes(), tmp_path / "drawn")


def test_a_video_is_not_taken_for_an_image(predict, tmp_path):
    (tmp_path / "clip.mp4").touch()
    with pytest.raises(ConfigError, match="clip.mp4 is a video: add --video"):
        predict(tmp_path / "clip.mp4")


def test_an_output_folder_that_is_a_file(predict, photos, tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(ConfigError, match="taken cannot be made"):
        predict(photos, output="taken")


def script(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "predict.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"},
    )


def test_the_script_as_a_user_runs_it(trained, photos, tmp_path):
    (photos / "b.png").write_bytes(b"no image")
    content = torch.load(trained.checkpoint)
    averaged = {f"module.{key}": value for key, value in content["model"].items()}
    checkpoint = tmp_path / "with_average.pth"
    torch.save({**content, "ema": {"n_averaged": torch.tensor(9), **averaged}}, checkpoint)
    result = script(
        *("--config-file", trained.config, "--checkpoint", checkpoint, "--device", CHILD),
        *(photos / "a.png", photos / "b.png", "--output", tmp_path / "drawn"),
    )
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr and "100%" in result.stderr
    assert f"{checkpoint}: its averaged weights (EMA of 9 steps) are used" in result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"  image {photos / 'b.png'} cannot be")
    assert pictures(tmp_path / "drawn") == ["a.jpg"]


def test_the_script_explains_a_missing_checkpoint(photos, tmp_path):
    result = script(
        *("--config-file", "configs/quickstart.py", "--checkpoint", "nowhere.pth"),
        *(photos, "--output", tmp_path / "drawn"),
    )
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: checkpoint nowhere.pth does not exist: name an existing file."
    ]
    assert not (tmp_path / "drawn").exists()
