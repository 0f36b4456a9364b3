"""Many images: lists and json files, several processes, and predictions that are killed."""

import json
import signal
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from co_detr.errors import ConfigError, DataError
from co_detr.tools.predict.command_line import parse_arguments, run
from co_detr.tools.predict.files import OutputFolder, predict_images
from co_detr.tools.predict.inputs import ImageInput
from co_detr.tools.predict.predictor import Predictor, Sample
from co_detr.tools.predict.results import PARTS, Classes, ResultParts
from tests.device import CHILD, NAME
from tests.engine.processes import TrainNet, fork_processes_of_num_gpus, free_port
from tests.prediction.trained_run import CLASSES

SMALL = "dataloader.test.mapper.augmentations.short_edge=48"


@pytest.fixture
def predict(trained, tmp_path):
    """Runs the command line in this process; returns its exit status and the bytes it wrote."""

    def call(*arguments: str | Path, output: str = "found") -> tuple[int, bytes]:
        options = ["--config-file", trained.config, "--checkpoint", trained.checkpoint]
        options += ["--device", NAME, "--score", "0", "--output", str(tmp_path / output)]
        status = run(parse_arguments([*options, *map(str, arguments)]))
        return status, (tmp_path / output / "predictions.json").read_bytes()

    return call


def write_json(path: Path, images: list[dict], **more: list[dict]) -> Path:
    path.write_text(json.dumps({"images": images} | more))
    return path


# What is read


def test_a_list_of_paths(predict, photos, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text(f"{photos / 'c.png'}\n\n  {photos / 'a.png'}\n{photos / 'no.png'}\n")
    status, written = predict(listed, "--no-pictures")
    assert status == 1  # one does not exist
    images = json.loads(written)["images"]
    assert [image["file_name"] for image in images] == [
        str(photos / "c.png"),
        str(photos / "a.png"),
    ]
    assert [path.name for path in (tmp_path / "found").iterdir()] == ["predictions.json"]
    listed.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"list.txt cannot be read .*UTF-8"):
        predict(listed)


def test_a_json_without_labels_keeps_its_ids_and_names(predict, photos, tmp_path):
    images = [{"id": 70, "file_name": "b.png"}, {"id": 7, "file_name": "sub/a.png"}]
    (photos / "sub").mkdir()
    (photos / "a.png").rename(photos / "sub" / "a.png")
    unlabeled = write_json(tmp_path / "test.json", images)
    status, written = predict(unlabeled, "--images", photos)
    content = json.loads(written)
    assert status == 0
    assert [(image["id"], image["file_name"]) for image in content["images"]] == [
        (70, "b.png"),
        (7, "sub/a.png"),
    ]
    assert {entry["image_id"] for entry in content["annotations"]} == {7, 70}
    assert content["categories"][0] == {"id": 1, "name": CLASSES[0]}


def test_categories_of_a_json_that_has_all_classes(predict, photos, tmp_path, capsys):
    images = [{"id": 1, "file_name": "a.png", "width": 80, "height": 60}]
    categories = [{"id": 10 * n, "name": name} for n, name in enumerate([*CLASSES, "more"], 1)]
    of_file = write_json(photos / "val.json", images, categories=categories)
    content = json.loads(predict(of_file)[1])
    assert content["categories"] == categories[:-1]
    plain = json.loads(predict(photos / "a.png", output="plain")[1])
    found = [entry["category_id"] for entry in content["annotations"]]
    assert found == [10 * entry["category_id"] for entry in plain["annotations"]]
    write_json(of_file, images, categories=categories[:2])
    assert json.loads(predict(of_file)[1])["categories"] == plain["categories"]
    assert "numbers them from 1" in capsys.readouterr().err


def test_sizes_of_a_json_have_to_be_true(predict, photos, capsys):
    images = [
        {"id": 1, "file_name": "a.png", "width": 60, "height": 80},
        {"id": 2, "file_name": "c.png", "width": 80, "height": 60},
    ]
    status, written = predict(write_json(photos / "val.json", images))
    assert status == 1 and [image["id"] for image in json.loads(written)["images"]] == [2]
    assert "a.png is 80x60 but its annotation file says 60x80" in capsys.readouterr().err


def test_wrong_inputs(predict, photos, tmp_path):
    image = {"id": 1, "file_name": "a.png"}
    good = write_json(tmp_path / "good.json", [image])
    for message, arguments in {
        "must be the only input": [good, photos],
        "belongs to a COCO-format json": [photos, "--images", photos],
        "none of the images of .* is below .*--images": [good],
        "two images with one id": [write_json(tmp_path / "twice.json", [image, image])],
        "each needs both": [write_json(tmp_path / "nameless.json", [{"id": 1}])],
        "there is nothing to predict": [
            write_json(tmp_path / "empty.json", [], annotations=[], categories=[])
        ],
        "--num-gpus 0 must be at least 1": [photos, "--num-gpus", "0"],
        "--video runs in one process": [photos, "--num-gpus", "2", "--video"],
    }.items():
        with pytest.raises((ConfigError, DataError), match=message):
            predict(*arguments)


# Predictions that go on


@pytest.fixture
def read(monkeypatch):
    """Names of the files that were read; a name in `stops` interrupts, as Ctrl-C does."""
    prepare, names, stops = Predictor.prepare, [], set()

    def noted(self, image):
        name = Path(image).name
        if name in stops:
            raise KeyboardInterrupt
        names.append(name)
        return prepare(self, image)

    monkeypatch.setattr(Predictor, "prepare", noted)
    noted.names, noted.stops = names, stops
    return noted


def test_an_interrupted_prediction_goes_on(predict, photos, tmp_path, read, capsys):
    _, undisturbed = predict(photos, output="undisturbed")
    (photos / "bad.png").write_bytes(b"no image")
    _, undisturbed = predict(photos, output="undisturbed")
    read.stops.add("c.png")
    with pytest.raises(KeyboardInterrupt):
        predict(photos)
    # As if it had been killed while it wrote the next line.
    with open(tmp_path / "found" / PARTS / "0.jsonl", "ab") as part:
        part.write(b'3\t{"id": 4, "fi')
    with pytest.raises(ConfigError, match="a part of another prediction, which differs in score"):
        predict(photos, "--score", "0.1")
    read.stops.clear()
    read.names.clear()
    capsys.readouterr()
    assert predict(photos) == (1, undisturbed)
    assert "Going on: 2 of 4 images are done." in capsys.readouterr().err
    assert read.names == ["bad.png", "c.png"]  # what could not be read may have been mended
    assert not (tmp_path / "found" / PARTS).exists()


def test_parts_of_any_number_of_processes(tmp_path):
    """Two wrote them, one goes on; an image that could not be read at first has been mended."""
    classes, found = Classes.numbered(["a"]), detections(1)
    for process, numbers in ((0, [0, 2]), (1, [3])):
        parts = ResultParts(tmp_path, classes, process)
        parts.begin({"score": 0}, goes_on=True)
        if process == 1:
            parts.add_problem(1, "cannot be read")
        for number in numbers:
            parts.add(number, f"id {number}", f"{number}.png", found)
        parts.close()
    parts = ResultParts(tmp_path, classes, 0)
    assert parts.begin({"score": 0}, goes_on=True) == {0, 2, 3}
    parts.add(1, "id 1", "1.png", found)
    assert parts.write() == (4, [])
    content = json.loads(parts.path.read_text())
    assert [image["id"] for image in content["images"]] == [f"id {number}" for number in range(4)]
    assert [entry["id"] for entry in content["annotations"]] == [1, 2, 3, 4]


def test_two_predictions_in_one_folder(tmp_path):
    first, second = (ResultParts(tmp_path, Classes.numbered(["a"])) for _ in range(2))
    first.begin({}, goes_on=True)
    first.add(0, 1, "a.png", detections(1))
    with pytest.raises(ConfigError, match="another prediction is writing to"):
        second.add(0, 1, "a.png", detections(1))


def test_a_damaged_part(tmp_path):
    parts = ResultParts(tmp_path, Classes.numbered(["a"]))
    parts.begin({}, goes_on=True)
    (tmp_path / PARTS / "0.jsonl").write_bytes(b"\0\0\0\n")
    with pytest.raises(DataError, match="0.jsonl has a line that no prediction wrote: remove"):
        parts.write()


# Memory


def detections(number: int) -> Instances:
    found = Instances((60, 80))
    found.pred_boxes = Boxes(torch.rand(number, 4))
    found.scores = torch.rand(number)
    found.pred_classes = torch.zeros(number, dtype=torch.int64)
    return found


class StandIn:
    """In place of a predictor: twenty detections in every image, at no cost."""

    def prepare(self, image):
        return Sample(np.zeros((60, 80, 3), np.uint8), torch.empty(0))

    def stream(self, samples):
        for key, sample in samples:
            yield key, sample, detections(20)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    peaks = {}
    for number in (100, 900):
        images = [ImageInput(n, f"{n}.png", f"{n}.png", f"{n}.jpg") for n in range(number)]
        output = OutputFolder(tmp_path / str(number), Classes.numbered(["a"]), with_pictures=False)
        output.results.begin({}, goes_on=True)
        tracemalloc.start()
        predict_images(StandIn(), images, range(number), output)
        assert output.results.write() == (number, [])
        peaks[number] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # The detections of an image are more than 5 kilobytes as Python has them.
    assert peaks[900] - peaks[100] < 800 * 500


# Processes


@pytest.fixture
def many(tmp_path):
    """A folder with 60 images."""
    folder = tmp_path / "many"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(60):
        pixels = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 32)).save(folder / f"{number:02}.png")
    return folder


def start(trained, inputs, output, rank=None, port=0, more=(), prepare=None):
    arguments = ["--checkpoint", trained.checkpoint, "--device", CHILD, "--score", "0"]
    arguments += ["--set", SMALL, "--no-pictures", "--output", str(output), str(inputs), *more]
    return TrainNet(
        arguments, rank, port, prepare=prepare, config=trained.config, command="predict"
    )


def start_two(trained, inputs, output):
    port = free_port()
    return [start(trained, inputs, output, rank, port) for rank in (0, 1)]


@pytest.mark.slow
def test_one_of_two_processes_is_killed_and_the_next_start_goes_on(trained, many, tmp_path):
    alone = start(trained, many, tmp_path / "alone").finish()
    assert alone.returncode == 0, alone.output

    found = tmp_path / "found"
    first, second = start_two(trained, many, found)
    part = found / PARTS / "1.jsonl"
    assert second.wait_until(lambda: part.is_file() and part.read_bytes().count(b"\n") > 5)
    second.kill()
    assert first.wait() == 2, first.output
    (error,) = first.finish().errors("[rank 0] error: ")
    assert "another process of this run is gone" in error
    assert "start it again, which goes on with the images that are not done" in error
    assert not (found / "predictions.json").exists()

    ranks = start_two(trained, many, found)
    assert [process.wait() for process in ranks] == [0, 0], [process.output for process in ranks]
    assert "Going on: " in ranks[0].output
    assert "Detections of 60 images" in ranks[0].output
    undisturbed = (tmp_path / "alone" / "predictions.json").read_bytes()
    assert (found / "predictions.json").read_bytes() == undisturbed


@pytest.mark.slow
def test_processes_of_num_gpus(trained, many, tmp_path):
    (many / "00.png").write_bytes(b"no image")
    finished = start(
        *(trained, many, tmp_path / "found"),
        more=("--num-gpus", "2"),
        prepare=fork_processes_of_num_gpus,
    ).finish()
    assert finished.returncode == 1, finished.output
    assert "Detections of 59 images" in finished.output
    assert finished.output.count("00.png cannot be decoded") == 1


@pytest.mark.slow
def test_what_one_process_finds_is_said_once(trained, tmp_path):
    ranks = start_two(trained, tmp_path / "nowhere", tmp_path / "found")
    assert [process.wait() for process in ranks] == [2, 2]
    said = [line for process in ranks for line in process.finish().errors("[rank")]
    assert len(said) == 1 and "nothing to read" in said[0]


@pytest.mark.slow
def test_a_process_that_is_told_to_stop_says_how_to_go_on(trained, many, tmp_path):
    ranks = start_two(trained, many, tmp_path / "found")
    for rank, process in enumerate(ranks):
        part = tmp_path / "found" / PARTS / f"{rank}.jsonl"
        assert process.wait_until(lambda part=part: part.is_file() and part.stat().st_size > 0)
    for process in ranks:
        process.send(signal.SIGTERM)
    assert [process.wait() for process in ranks] == [2, 2]
    said = [process.output for process in ranks]
    assert all("error: this process was told to stop" in output for output in said), said
