"""Videos, where OpenCV is installed; a clear sentence where it is not."""

import json
import sys

import numpy as np
import pytest

from co_detr.errors import ConfigError
from co_detr.tools.predict.command_line import parse_arguments, run
from co_detr.tools.predict.files import VideoReader
from tests.device import NAME

FRAMES = 7


def arguments(trained, tmp_path, *more):
    options = ["--config-file", trained.config, "--checkpoint", trained.checkpoint]
    options += ["--device", NAME, "--output", str(tmp_path / "drawn"), "--video"]
    return parse_arguments([*options, *map(str, more)])


def test_without_opencv(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ConfigError, match="pip install opencv-python-headless"):
        run(arguments(trained, tmp_path, "clip.mp4"))
    assert not (tmp_path / "drawn").exists()


def write_clip(path, frames):
    """Motion JPEG, 10 frames per second; frames are in OpenCV's order blue, green, red."""
    cv2 = pytest.importorskip("cv2")
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (80, 64))
    for frame in frames:
        writer.write(frame)
    writer.release()
    return path


@pytest.fixture
def clip(tmp_path):
    """Seven frames, each in a shade of red of its own."""
    frames = np.zeros((FRAMES, 64, 80, 3), np.uint8)
    frames[..., 2] = 30 * np.arange(FRAMES)[:, None, None] + 20
    return write_clip(tmp_path / "clip.avi", frames)


def test_every_frame_is_drawn_and_listed(trained, predictor, clip, tmp_path):
    assert run(arguments(trained, tmp_path, clip, "--score", "0", "--batch-size", "2")) == 0
    content = json.loads((tmp_path / "drawn" / "predictions.json").read_text())
    assert [image["frame"] for image in content["images"]] == [*range(FRAMES)]
    assert {image["file_name"] for image in content["images"]} == {str(clip)}
    frames = [*VideoReader(clip)]
    assert frames[3].shape == (64, 80, 3)
    # In the order red, green, blue.
    assert np.abs(frames[3].mean((0, 1)) - [110, 0, 0]).max() < 6
    found = predictor(frames[3])
    mine = [annotation for annotation in content["annotations"] if annotation["image_id"] == 4]
    np.testing.assert_allclose(
        [annotation["score"] for annotation in mine], found.scores.tolist(), rtol=0, atol=1e-5
    )


def test_the_drawn_video_has_the_frames_and_colors_of_the_clip(trained, clip, tmp_path):
    assert run(arguments(trained, tmp_path, clip, "--score", "1")) == 0  # no boxes
    drawn = VideoReader(tmp_path / "drawn" / "clip.mp4")
    frames = [*drawn]
    assert drawn.rate == pytest.approx(10) and len(frames) == FRAMES
    assert np.abs(frames[-1].mean((0, 1)) - [200, 0, 0]).max() < 12


def test_damaged_videos_are_listed_and_the_others_done(trained, clip, tmp_path, capsys):
    (tmp_path / "no.avi").write_bytes(b"no video")
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 80, 3), dtype=np.uint8)
    cut = write_clip(tmp_path / "cut.avi", noise)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    status = run(arguments(trained, tmp_path, tmp_path / "no.avi", cut, clip, "--batch-size", "4"))
    assert status == 1
    printed = capsys.readouterr().err
    assert "2 could not be read:" in printed
    assert "no.avi cannot be opened" in printed and "cut.avi ends after 10 of 20" in printed
    content = json.loads((tmp_path / "drawn" / "predictions.json").read_text())
    files = [image["file_name"] for image in content["images"]]
    assert files == 10 * [str(cut)] + FRAMES * [str(clip)]
