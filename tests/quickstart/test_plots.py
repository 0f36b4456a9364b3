"""Training curves and prediction grids, from fabricated runs."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from co_detr.data.segmentation import encoded_mask
from co_detr.tools.draw.boxes import load_images, plot_predictions
from co_detr.tools.draw.curves import plot_training_curves, read_log, smooth

MakeRun = Callable[..., None]
THRESHOLD = {"score_threshold": 0.3, "count": 12}


def write_metrics(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_read_log_keeps_numbers_by_iteration(tmp_path: Path) -> None:
    path = write_metrics(
        tmp_path / "metrics.jsonl",
        [
            {"iteration": 0, "total_loss": 5.0, "note": "text"},
            {"iteration": 10, "total_loss": 3.0, "bbox/AP": 7.5},
        ],
    )
    log = read_log(path, "run")
    assert set(log.series) == {"total_loss", "bbox/AP"}
    assert log.series["total_loss"].iterations.tolist() == [0, 10]
    assert log.series["total_loss"].values.tolist() == [5.0, 3.0]


def test_read_log_drops_what_a_resumed_run_did_again(tmp_path: Path) -> None:
    old = [{"iteration": i, "total_loss": 1.0} for i in (0, 10, 20, 30)]
    new = [{"iteration": i, "total_loss": 2.0} for i in (15, 25)]
    series = read_log(write_metrics(tmp_path / "m", old + new), "run").series["total_loss"]
    assert series.iterations.tolist() == [0, 10, 15, 25]
    assert series.values.tolist() == [1.0, 1.0, 2.0, 2.0]


def test_read_log_survives_a_half_written_last_line(tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "m", [{"iteration": 0, "total_loss": 1.0}])
    path.write_text(path.read_text() + '{"iteration": 20, "tot')
    assert read_log(path, "run").series["total_loss"].iterations.tolist() == [0]


def test_losses_are_summed_by_part(tmp_path: Path) -> None:
    record = {
        "iteration": 0,
        "total_loss": 15.0,
        "matching.loss_cls": 1.0,
        "matching.d0.loss_giou": 2.0,
        "roi.loss_cls": 4.0,
        "loss_rpn": 8.0,
        "val_loss/matching.loss_cls": 16.0,
        "lr": 1e-4,
    }
    parts = read_log(write_metrics(tmp_path / "m", [record]), "run").losses_by_part()
    assert {name: series.values.tolist() for name, series in parts.items()} == {
        "matching": [3.0],
        "roi": [4.0],
        "other": [8.0],
    }


def test_losses_of_a_run_that_went_on_under_new_names_are_summed(tmp_path: Path) -> None:
    first = {"iteration": 0, "atss.loss_cls": 1.0, "atss.loss_centreness": 2.0}
    second = {"iteration": 20, "atss.loss_cls": 3.0, "atss.loss_centerness": 4.0}
    parts = read_log(write_metrics(tmp_path / "m", [first, second]), "run").losses_by_part()
    assert parts["atss"].iterations.tolist() == [0, 20]
    assert parts["atss"].values.tolist() == [3.0, 7.0]


def test_smooth_is_a_centered_mean() -> None:
    np.testing.assert_allclose(smooth(np.array([1.0, 2.0, 6.0]), 3), [1.5, 3.0, 4.0])
    np.testing.assert_allclose(smooth(np.array([4.0, 2.0]), 1), [4.0, 2.0])


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds no metrics yet"), ('nonsense\n{"iteration": 1}\n', "line 1 is not a metrics")],
)
def test_unreadable_metrics_are_reported(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_log(path, "run")


def test_missing_metrics_are_reported(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="metrics.jsonl does not exist; train first"):
        read_log(tmp_path / "metrics.jsonl", "run")


def test_curves_of_runs_with_different_parts(tmp_path: Path, make_run: MakeRun) -> None:
    make_run(tmp_path / "k2")
    make_run(tmp_path / "k0", parts=("matching",))
    logs = [read_log(tmp_path / name / "metrics.jsonl", name) for name in ("k2", "k0")]
    plot_training_curves(logs, tmp_path / "new" / "curve.png")
    assert_is_picture(tmp_path / "new" / "curve.png")


def test_the_validation_loss_is_drawn_beside_the_total_loss(tmp_path, monkeypatch) -> None:
    records = [{"iteration": i, "total_loss": 5.0 - i, "val_loss/total": 6.0 - i} for i in range(3)]
    log = read_log(write_metrics(tmp_path / "m", records), "run")
    monkeypatch.setattr(plt, "close", lambda figure: None)
    plot_training_curves([log], tmp_path / "curve.png")
    total = plt.gcf().axes[0]
    drawn = {line.get_label(): line.get_ydata().tolist() for line in total.get_lines()}
    assert drawn["run, val set"] == [6.0, 5.0, 4.0]
    monkeypatch.undo()
    plt.close()


def test_curves_without_evaluation_or_with_nan(tmp_path: Path) -> None:
    records = [{"iteration": i, "total_loss": float("nan") if i else 1.0} for i in range(5)]
    log = read_log(write_metrics(tmp_path / "m", records), "run")
    plot_training_curves([log], tmp_path / "curve.png")
    assert_is_picture(tmp_path / "curve.png")


def test_load_images_joins_truth_and_predictions(tmp_path: Path, make_run: MakeRun) -> None:
    make_run(tmp_path / "run")
    first, second = load(tmp_path / "run")
    assert [(box.class_name, box.score) for box in first.truth] == [("four", None)]
    assert [(box.class_name, box.score) for box in first.predictions] == [("nine", 0.9)]
    assert first.predictions[0].xywh == (11, 12, 20, 30)
    assert second.truth == second.predictions == []
    assert len(load(tmp_path / "run", count=1)) == 1


def test_load_images_reads_what_training_reads(tmp_path: Path, make_run: MakeRun) -> None:
    make_run(tmp_path / "run")
    file = tmp_path / "run" / "val.json"
    coco = json.loads(file.read_text())
    for image in coco["images"]:
        image |= {"id": float(image["id"]), "file_name": f"C:\\set\\{image['file_name']}"}
    for category in coco["categories"]:
        category |= {"id": float(category["id"]), "name": "digit"}
    file.write_text(json.dumps(coco), encoding="utf-8-sig")
    first, _ = load(tmp_path / "run")
    assert first.path.name == "a.png"
    assert [box.class_name for box in first.truth] == ["digit (id 4)"]
    assert [box.class_name for box in first.predictions] == ["digit (id 9)"]
    # A test set: no annotations and no categories.
    file.write_text(json.dumps({"images": coco["images"]}))
    first, _ = load(tmp_path / "run")
    assert first.truth == [] and [b.class_name for b in first.predictions] == ["class 9"]


def test_grid_draws_boxes(tmp_path: Path, make_run: MakeRun) -> None:
    make_run(tmp_path / "run")
    images = load(tmp_path / "run")
    plot_predictions(images, tmp_path / "with.png")
    plot_predictions(load(tmp_path / "run", score_threshold=0.95), tmp_path / "without.png")
    assert_is_picture(tmp_path / "with.png")
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()


def test_masks_of_both_sides_are_drawn(tmp_path: Path, make_run: MakeRun) -> None:
    make_run(tmp_path / "run")
    plot_predictions(load(tmp_path / "run"), tmp_path / "boxes.png")
    files = [tmp_path / "run" / name for name in ("val.json", "coco_instances_results.json")]
    truth, results = (json.loads(file.read_text()) for file in files)
    truth["images"][0] |= {"height": 60, "width": 80}
    polygon = [[10, 12, 30, 12, 30, 42]]
    truth["annotations"][0]["segmentation"] = polygon
    encoded = encoded_mask(polygon, 60, 80)
    results[0]["segmentation"] = encoded | {"counts": encoded["counts"].decode()}
    for file, content in zip(files, (truth, results), strict=True):
        file.write_text(json.dumps(content))
    first, second = load(tmp_path / "run")
    for box in (*first.truth, *first.predictions):
        assert (box.mask.left, box.mask.top) == (10, 12) and 250 < box.mask.pixels.sum() < 350
    plot_predictions([first, second], tmp_path / "masks.png")
    assert (tmp_path / "masks.png").read_bytes() != (tmp_path / "boxes.png").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 3}, "prediction for image 3, which .*val.json does not list"),
        ({"category_id": 5}, "results.json uses category 5"),
    ],
)
def test_predictions_of_another_data_set_are_refused(
    tmp_path: Path, make_run: MakeRun, change: dict, message: str
) -> None:
    make_run(tmp_path / "run")
    entry = {"image_id": 1, "category_id": 4, "bbox": [1, 1, 2, 2], "score": 0.5} | change
    (tmp_path / "run" / "coco_instances_results.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "run")


def test_missing_inputs_of_the_grid_are_reported(tmp_path: Path, make_run: MakeRun) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "run" / "images" / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match="b.png does not exist; check the image folder"):
        load(tmp_path / "run")
    (tmp_path / "run" / "coco_instances_results.json").unlink()
    with pytest.raises(FileNotFoundError, match="evaluate first"):
        load(tmp_path / "run")


def load(run: Path, **options: object) -> list:
    paths = (run / "val.json", run / "images", run / "coco_instances_results.json")
    return load_images(*paths, **(THRESHOLD | options))


def assert_is_picture(path: Path) -> None:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    assert min(pixels.shape) > 100 and pixels.std() > 1
