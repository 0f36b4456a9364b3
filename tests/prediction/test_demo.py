"""demo.py without a browser: what the server answers, and how the command line fails."""

import base64
import concurrent.futures
import io
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.prediction.trained_run import CLASSES

pytest.importorskip("flask")
pytest.importorskip("waitress")

from co_detr.data.images import ImageReader
from co_detr.engine.views import Tiles
from co_detr.errors import ConfigError, NonFiniteError
from co_detr.tools.demo import command_line
from co_detr.tools.demo.server import MEGABYTES, create_app, listen
from co_detr.tools.predict.predictor import Predictor
from tests.device import CHILD, NAME
from tests.paths import python_path

pytestmark = pytest.mark.skipif(NAME == "emulated", reason="the emulation lives in one thread")
ROOT = Path(__file__).resolve().parents[2]
RAW = "application/octet-stream"


@pytest.fixture(scope="module")
def client(predictor):
    return create_app(predictor, 0.25, "the <model>").test_client()


def encoded(pixels: np.ndarray, suffix: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, suffix, **options)
    return buffer.getvalue()


def detect(client, content: bytes, **query):
    return client.post("/detect", data=content, query_string=query, content_type=RAW)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def test_page_names_everything_and_loads_nothing_from_elsewhere(client):
    page = client.get("/")
    text = page.get_data(as_text=True)
    assert "the &lt;model&gt;" in text and 'value="0.25"' in text
    assert all(name in text for name in CLASSES)
    files = sorted(path.name for path in (ROOT / "co_detr/tools/demo/static").iterdir())
    assert len(files) >= 3
    sources = [text] + [client.get(f"/static/{name}").get_data(as_text=True) for name in files]
    assert all("http:" not in source and "https:" not in source for source in sources)
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]


def test_page_names_the_detector():
    model = ["--config-file", "runs/config.yaml", "--checkpoint", "runs/a.pth"]
    options = command_line.parse_arguments([*model, "--detector", "cascade"])
    assert command_line._title(options) == "config.yaml, a.pth, cascade"
    assert command_line._title(command_line.parse_arguments(model)) == "config.yaml, a.pth"


def test_answer_is_what_the_predictor_finds(client, predictor, pixels):
    answer = detect(client, encoded(pixels), name="C:/fake/cells.png", width=80, height=60)
    assert answer.status_code == 200
    found = predictor(pixels)
    coco = answer.json["coco"]
    assert coco["images"] == [{"id": 1, "file_name": "cells.png", "width": 80, "height": 60}]
    assert [category["name"] for category in coco["categories"]] == CLASSES
    # All of them, whatever the slider's start: moving it must not ask again.
    assert [annotation["score"] for annotation in coco["annotations"]] == found.scores.tolist()
    assert min(found.scores) < 0.25
    assert answer.json["seconds"] > 0
    assert answer.json["picture"] is None


def picture_of(answer) -> np.ndarray:
    header, _, data = answer.json["picture"].partition(",")
    assert header == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.mark.parametrize(
    "query", [{}, {"width": 60, "height": 80}, {"width": "null", "height": "null"}]
)
def test_picture_for_a_browser_that_shows_it_otherwise(client, pixels, query):
    answer = detect(client, encoded(pixels, "TIFF"), name="a.tif", **query)
    assert picture_of(answer).shape == pixels.shape


def test_exif_orientation(client, pixels):
    exif = Image.Exif()
    exif[274] = 3  # upside down: the size does not tell
    for suffix, sent in (("JPEG", False), ("PNG", True)):
        content = encoded(pixels, suffix, exif=exif)
        answer = detect(client, content, name="a", width=80, height=60)
        assert (answer.json["picture"] is not None) == sent
    smooth = np.asarray(Image.fromarray(pixels).resize((80, 60)).resize((4, 3)))
    shown = np.asarray(Image.fromarray(picture_of(answer)).resize((4, 3)))
    np.testing.assert_allclose(shown[::-1, ::-1].astype(int), smooth, atol=40)
    exif[274] = 6  # a phone held upright
    content = encoded(pixels, "JPEG", exif=exif)
    image = detect(client, content, name="a", width=60, height=80).json["coco"]["images"][0]
    assert (image["width"], image["height"]) == (60, 80)


def test_what_is_no_image_is_explained(client, pixels):
    answer = detect(client, b"some text", name="notes.txt")
    assert answer.status_code == 400
    assert answer.json["error"].startswith("notes.txt cannot be decoded (it is none of JPEG, PNG,")
    answer = detect(client, encoded(pixels)[:3000], name="half.png")
    assert answer.status_code == 400
    assert answer.json["error"].startswith("half.png: the image cannot be decoded")


def test_refusals(client, predictor, pixels, monkeypatch, caplog):
    other_type = client.post("/detect", data=encoded(pixels), content_type="text/plain")
    assert other_type.status_code == 415 and RAW in other_type.json["error"]
    large = detect(client, bytes(MEGABYTES * 2**20 + 1), name="large.png")
    assert large.status_code == 413 and f"{MEGABYTES} MB" in large.json["error"]
    assert client.get("/nowhere").status_code == 404
    monkeypatch.setattr(predictor, "reader", ImageReader(max_pixels=1000))
    bomb = detect(client, encoded(pixels), name="huge.png")
    assert bomb.status_code == 400
    assert bomb.json["error"].startswith("huge.png of 80x60 pixels has more than the 1,000")


def test_a_name_that_is_not_the_pages_is_refused(predictor, pixels):
    client = create_app(predictor, 0.25, "model", ["Box.example"]).test_client()

    def status(host: str) -> int:
        return client.get("/", headers={"Host": host}).status_code

    for host in ("localhost:7860", "127.0.0.1", "[::1]:7860", "192.168.1.5:80", "box.example"):
        assert status(host) == 200
    assert status(socket.gethostname()) == 200
    for host in ("rebound.example", "rebound.example:7860", "localhost.rebound.example", ""):
        assert status(host) == 403
    answer = client.post("/detect", data=encoded(pixels), headers={"Host": "rebound.example"})
    assert answer.status_code == 403 and "--allow-host NAME" in answer.json["error"]


def test_postscript_is_not_run(client, pixels, monkeypatch):
    started = []
    for name in ("check_call", "Popen"):
        monkeypatch.setattr(subprocess, name, lambda *args, **_: started.append(args))
    answer = detect(client, encoded(pixels, "EPS"), name="a.png")
    assert answer.status_code == 400 and not started
    assert answer.json["error"].startswith("a.png cannot be decoded")


def test_the_page_shows_what_the_model_sees_of_deep_images(client, pixels):
    content = encoded(pixels[:, :, 0].astype(np.uint16) * 100)
    answer = detect(client, content, name="a.png", width=80, height=60)
    assert abs(picture_of(answer).mean() - pixels[:, :, 0].mean() * 100 / 257) < 2


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (NonFiniteError("a score is NaN: correct it."), "a score is NaN: correct it."),
        (RuntimeError("shape"), "the model failed (RuntimeError): its terminal shows where."),
    ],
)
def test_a_failing_model_is_explained(client, predictor, pixels, monkeypatch, error, sentence):
    def fail(*_):
        raise error

    monkeypatch.setattr(predictor, "stream", fail)
    answer = detect(client, encoded(pixels), name="a.png")
    assert (answer.status_code, answer.json) == (500, {"error": sentence})


def test_several_users_at_once_get_their_own_boxes(client, predictor):
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (40, 50 + 3 * i, 3), dtype=np.uint8) for i in range(6)]
    expected = [predictor(image).pred_boxes.tensor[0, 0].item() for image in images]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        send = lambda image: detect(client.application.test_client(), encoded(image))  # noqa: E731
        answers = [answer.json["coco"] for answer in pool.map(send, images)]
    assert [answer["images"][0]["width"] for answer in answers] == [50 + 3 * i for i in range(6)]
    assert [answer["annotations"][0]["bbox"][0] for answer in answers] == expected


def test_views_of_the_page_are_those_of_predict(trained, monkeypatch, pixels):
    """The page looks as often, and at as much at once, as it was asked to."""
    model = ["--config-file", trained.config, "--checkpoint", trained.checkpoint]
    with pytest.raises(ConfigError, match="--overlap is of tiles"):
        command_line.run(command_line.parse_arguments([*model, "--overlap", "0.5"]))
    served = []

    class Stopped(Exception):
        pass

    def stop(predictor, *_):
        served.append(predictor)
        raise Stopped

    monkeypatch.setattr("co_detr.tools.demo.server.create_app", stop)
    with pytest.raises(Stopped):
        command_line.run(
            command_line.parse_arguments([*model, "--tiles", "40", "--overlap", "0.5"])
        )
    same = Predictor(trained.config, trained.checkpoint, tiles=Tiles(40, overlap=0.5))
    assert served[0](pixels).scores.tolist() == same(pixels).scores.tolist()


def test_arguments_and_ports_are_explained(client, trained, monkeypatch):
    model = ["--config-file", trained.config, "--checkpoint", trained.checkpoint]
    assert command_line.parse_arguments(model).host == "127.0.0.1"
    for wrong, limits in (("--score=2.0", "from 0 to 1"), ("--port=70000", "from 1 to 65535")):
        with pytest.raises(ConfigError, match=f"{wrong.replace('=', ' ')} must be {limits}"):
            command_line.run(command_line.parse_arguments([*model, wrong]))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{port} \(Address already in use\): ch"):
            listen(client.application, "127.0.0.1", port)
    with pytest.raises(ConfigError, match="cannot listen on nowhere.invalid:7860"):
        listen(client.application, "nowhere.invalid", 7860)
    monkeypatch.setitem(sys.modules, "waitress", None)
    with pytest.raises(ConfigError, match="pip install flask waitress"):
        command_line.run(command_line.parse_arguments(model))


def test_the_script_as_a_user_runs_it(trained):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "demo.py", "--config-file", trained.config, "--port", str(port)]
        + ["--checkpoint", trained.checkpoint, "--device", CHILD],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores Ctrl-C, and so would what that starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        line = process.stdout.readline()
        assert line.startswith(f"Open http://localhost:{port} in a browser"), process.stderr.read()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as page:
            assert "config.yaml, model_final.pth" in page.read().decode()
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in printed
