"""The page of demo.py in headless Chromium: boxes appear, the slider filters, files are saved.

Skipped without Selenium, Chromium or its driver.
"""

import io
import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_utils
import pytest
from PIL import Image

pytest.importorskip("selenium")
pytest.importorskip("flask")
pytest.importorskip("waitress")
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from co_detr.tools.demo.server import Detector, create_app, listen

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium and its driver")

# Headless; nothing but the page is loaded.
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--disable-dev-shm-usage",
)
BCCD = Path(__file__).resolve().parents[3] / "shared" / "data" / "bccd" / "images"
BOXES = "#boxes .box:not([hidden])"
ROWS = "#list li:not([hidden])"


@dataclass(frozen=True)
class Page:
    """The opened page; `runs` grows by one entry for each image that the model sees."""

    driver: webdriver.Chrome
    downloads: Path
    runs: list[str]

    def find(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def count(self, selector: str) -> int:
        return len(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def choose(self, path: Path) -> None:
        self.find("#file").send_keys(str(path))

    def wait(self, condition) -> None:
        WebDriverWait(self.driver, 60).until(lambda _: condition())

    def wait_for_boxes(self) -> None:
        self.wait(lambda: self.find("#panel").is_displayed())

    def slide(self, score: float) -> None:
        self.driver.execute_script(
            "const slider = document.getElementById('score'); slider.value = arguments[0];"
            "slider.dispatchEvent(new Event('input'));",
            score,
        )


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for flag in (*FLAGS, f"--user-data-dir={profile}", "--window-size=1200,850"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver, predictor, tmp_path, monkeypatch) -> Iterator[Page]:
    yield from opened(driver, predictor, tmp_path, monkeypatch)


@pytest.fixture
def page_with_masks(driver, predictor_of_masks, tmp_path, monkeypatch) -> Iterator[Page]:
    yield from opened(driver, predictor_of_masks, tmp_path, monkeypatch)


def opened(driver, predictor, tmp_path, monkeypatch) -> Iterator[Page]:
    runs: list[str] = []
    detect = Detector._detect

    def counted(self, upload):
        detection = detect(self, upload)
        runs.append(upload.name)
        return detection

    monkeypatch.setattr(Detector, "_detect", counted)
    server = listen(create_app(predictor, 0.0, "a tiny model"), "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    downloads = tmp_path / "downloads"
    driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)}
    )
    driver.get(f"http://127.0.0.1:{server.effective_port}/")
    yield Page(driver, downloads, runs)
    # A script error or a load that the policy blocks would be here; a refused file is not one.
    problems = [entry for entry in driver.get_log("browser") if "/detect" not in entry["message"]]
    server.close()
    assert problems == []


def test_the_slider_filters_without_the_model(page, predictor, photos, tmp_path):
    scores = predictor(photos / "a.png").scores
    page.choose(photos / "a.png")
    page.wait_for_boxes()
    assert page.count(BOXES) == page.count(ROWS) == len(scores) > 10
    for limit in (0.3, scores.median().item(), 0.0, 1.0):
        page.slide(limit)
        limit = round(limit, 2)  # the slider's step
        expected = int((scores >= limit).sum())
        assert page.count(BOXES) == page.count(ROWS) == expected
        assert page.find("#summary").text.startswith(f"{expected} of {len(scores)} boxes, found in")
        assert page.find("#threshold").text == f"{limit:.2f}"
    assert page.runs == ["a.png"]


def test_the_slider_by_keyboard(page, photos):
    page.choose(photos / "a.png")
    page.wait_for_boxes()
    before = page.count(BOXES)
    page.find("#score").send_keys(Keys.END)
    assert page.count(BOXES) < before
    page.find("#score").send_keys(Keys.HOME)
    assert page.count(BOXES) == before


@pytest.mark.skipif(not BCCD.is_dir(), reason="the blood cells are not there")
def test_a_photograph(page, predictor, tmp_path):
    photograph = BCCD / "BloodImage_00007.jpg"
    scores = predictor(photograph).scores
    page.choose(photograph)
    page.wait_for_boxes()
    screenshots = []
    for limit in (0.0, 0.99):
        page.slide(limit)
        assert page.count(BOXES) == int((scores >= limit).sum())
        page.driver.save_screenshot(str(tmp_path / "page.png"))
        with Image.open(tmp_path / "page.png") as screenshot:
            screenshots.append(np.asarray(screenshot.convert("RGB")).astype(int))
    assert len(scores) > page.count(BOXES)
    # A good part of the page has changed with the boxes.
    assert (np.abs(screenshots[0] - screenshots[1]).max(2) > 50).mean() > 0.02


def test_boxes_lie_where_they_were_found(page, predictor, photos):
    found = predictor(photos / "b.png")
    page.choose(photos / "b.png")
    page.wait_for_boxes()
    places = page.driver.execute_script(
        "const all = document.getElementById('picture').getBoundingClientRect();"
        "return [...document.querySelectorAll('.box')].map((box) => {"
        "  const { left, top, right, bottom } = box.getBoundingClientRect();"
        "  return [(left - all.left) / all.width, (top - all.top) / all.height,"
        "          (right - all.left) / all.width, (bottom - all.top) / all.height]; });"
    )
    height, width = found.image_size
    expected = found.pred_boxes.tensor.numpy() / [width, height, width, height]
    placed = np.array(sorted(places))
    # Borders have a width, so that a box is never smaller than them.
    np.testing.assert_allclose(placed, sorted(expected.tolist()), atol=0.02)


def test_downloads(page, predictor, photos):
    scores = predictor(photos / "a.png").scores
    page.choose(photos / "a.png")
    page.wait_for_boxes()
    limit = round(scores.median().item(), 2)
    page.slide(limit)
    page.find("#save-json").click()
    page.find("#save-picture").click()
    picture, content = page.downloads / "a_boxes.jpg", page.downloads / "a.json"
    page.wait(lambda: picture.exists() and content.exists())
    saved = json.loads(content.read_text())
    assert [annotation["score"] for annotation in saved["annotations"]] == [
        score for score in scores.tolist() if score >= limit
    ]
    with Image.open(picture) as drawn, Image.open(photos / "a.png") as image:
        assert drawn.size == image.size
        difference = np.abs(np.asarray(drawn).astype(int) - np.asarray(image))
    assert difference.max() > 100


SHOWN_MASKS = "#masks path:not([hidden])"


def test_masks_are_shown_filtered_and_saved(page_with_masks, predictor_of_masks, photos):
    page, found = page_with_masks, predictor_of_masks(photos / "b.png")
    page.choose(photos / "b.png")
    page.wait_for_boxes()
    assert page.count(SHOWN_MASKS) == page.count(BOXES) == len(found)
    # Every mask lies where its pixels are, and is as large.
    shapes = page.driver.execute_script(
        "return [...document.querySelectorAll('#masks path')].map((path) => {"
        "  const { x, y, width, height } = path.getBBox(); return [x, y, width, height]; });"
    )
    extents = [mask_utils.toBbox(rle).tolist() for rle in found.pred_masks.rles()]
    assert sorted(shapes) == sorted(extents)
    limit = round(found.scores.median().item(), 2)
    page.slide(limit)
    assert page.count(SHOWN_MASKS) == page.count(BOXES) == int((found.scores >= limit).sum())

    page.find("#save-json").click()
    content, picture = page.downloads / "b.json", page.downloads / "b_boxes.jpg"
    page.wait(content.exists)
    saved = json.loads(content.read_text())["annotations"]
    kept = found[found.scores >= limit]
    assert [annotation["segmentation"] for annotation in saved] == kept.pred_masks.rles()
    assert [annotation["mask_score"] for annotation in saved] == kept.mask_scores.tolist()

    pictures = []
    for _ in range(2):
        page.find("#save-picture").click()
        page.wait(picture.exists)
        with Image.open(picture) as image:
            pictures.append(np.asarray(image).astype(int))
        picture.unlink()
        page.find("#masks-shown").click()
        assert page.find("#masks").is_displayed() == (len(pictures) == 2)
    assert np.abs(pictures[0] - pictures[1]).max() > 50  # without the masks


def test_a_model_of_boxes_has_no_switch_for_masks(page, photos):
    page.choose(photos / "a.png")
    page.wait_for_boxes()
    assert not page.find("#with-masks").is_displayed() and not page.count("#masks path")


def test_pointing_marks_the_box_and_its_row(page, photos):
    page.choose(photos / "a.png")
    page.wait_for_boxes()
    row = page.find("#list li:nth-child(3)")
    webdriver.ActionChains(page.driver).move_to_element(row).perform()
    assert page.count(".box.active") == page.count("#list .active") == 1
    score = row.find_element(By.CSS_SELECTOR, ".figure").text
    assert page.find(".box.active").text.endswith(score)


def drop(page: Page, content: bytes, name: str) -> None:
    page.driver.execute_script(
        "const data = new DataTransfer();"
        "data.items.add(new File([new Uint8Array(arguments[0])], arguments[1]));"
        "document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true}));",
        list(content),
        name,
    )


def test_a_dropped_text_is_explained_and_an_image_replaces_it(page, photos):
    drop(page, b"some text", "notes.txt")
    page.wait(lambda: page.find("#error").is_displayed())
    sentence = page.find("#error").text
    assert sentence.startswith("notes.txt cannot be decoded (it is none of JPEG, PNG")
    assert not page.find("#panel").is_displayed() and not page.find("#stage").is_displayed()
    drop(page, (photos / "a.png").read_bytes(), "a.png")
    page.wait_for_boxes()
    assert not page.find("#error").is_displayed() and page.count(BOXES) > 0


def test_a_format_that_only_the_server_reads_is_shown(page, photos):
    buffer = io.BytesIO()
    Image.open(photos / "a.png").save(buffer, "TIFF")
    drop(page, buffer.getvalue(), "a.tif")
    page.wait_for_boxes()
    assert page.find("#picture").get_property("naturalWidth") == 80


def test_the_newest_image_wins(page, predictor, photos, monkeypatch):
    prepare = predictor.prepare

    def slow(image):
        time.sleep(0.7)
        return prepare(image)

    monkeypatch.setattr(predictor, "prepare", slow)
    page.choose(photos / "a.png")
    page.choose(photos / "b.png")
    page.wait_for_boxes()
    # The boxes of a.png, which come in between, were not shown on b.png.
    assert page.runs == ["a.png", "b.png"]
    assert page.find("#picture").get_property("naturalHeight") == 70
    assert not page.find("#busy").is_displayed()


def test_a_phone_needs_no_sideways_scrolling(page, photos):
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.choose(photos / "a.png")
        page.wait_for_boxes()
        width = "return document.documentElement.scrollWidth"
        assert page.driver.execute_script(width) <= 360
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
