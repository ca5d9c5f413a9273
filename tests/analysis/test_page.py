"""The page of a report: what is on it, and how it behaves in a browser."""

import json
import re

import cv2
import numpy as np
import pytest

from retina_plugin.analysis import GroundTruth, analyze, write_report
from retina_plugin.analysis.charts import MOST_CLASSES
from tests.analysis.toy import NAMES, dataset, detections
from tests.deploy.browser import Browser, find_browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of the dataset; the last one is missing and the one before is damaged."""
    folder = tmp_path_factory.mktemp("images")
    for image in range(1, 12):
        pixels = np.full((200, 400, 3), 20 * image, np.uint8)
        cv2.imwrite(str(folder / f"{image}.png"), pixels)
    (folder / "11.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory):
    coco = dataset()
    truth = GroundTruth.from_coco(coco, "test", str(folder))
    results, other = detections(coco), detections(coco, seed=1, quality=0.3)
    return write_report(
        analyze(truth, results, other), tmp_path_factory.mktemp("out"), model="m<i>"
    )


def test_names_are_text(page):
    """A class, model or file name with HTML in it is shown as it is."""
    html = page.read_text()
    own = html.replace("<b>{{", "")
    assert "cow &lt;b&gt;" in own and "m&lt;i&gt;" in own
    assert "cow <b>" not in own
    data = re.search(r'id="figure-data">(.*?)</script>', html, re.DOTALL)[1]
    assert "<" not in data
    json.loads(data)


def test_report_is_written_with_missing_images(page, caplog):
    assert {p.name for p in page.parent.iterdir()} == {"report.html", "report.json"}
    assert "Images that cannot be read" in page.read_text()
    assert json.loads((page.parent / "report.json").read_text())["dataset"] == "test"


def test_many_classes_stay_small(tmp_path):
    """A thousand classes: the chart of confusions has the most confused ones."""
    coco = dataset(images=2, classes=[f"class {k}" for k in range(1000)])
    coco["annotations"] = coco["annotations"][:600]
    page = write_report(analyze(GroundTruth.from_coco(coco, "many"), detections(coco)), tmp_path)
    data = re.search(r'id="figure-data">(.*?)</script>', page.read_text(), re.DOTALL)[1]
    assert len(json.loads(data)["confusion"]["data"][0]["z"]) == MOST_CLASSES + 1
    assert page.stat().st_size < 12e6


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium")
    with Browser(program, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def opened(browser, page):
    browser.open(page.as_uri())
    browser.wait_for("document.querySelectorAll('.chart .main-svg').length > 0")
    return browser


@pytest.mark.slow
def test_page_has_all_charts_and_asks_nobody(opened):
    """No request but for the file itself, no error, no sideways scrolling on a small screen."""
    charts = opened.evaluate("document.querySelectorAll('.chart').length")
    drawn = opened.evaluate("document.querySelectorAll('.chart .main-svg:first-of-type').length")
    assert charts == 10 and drawn >= charts
    loaded = opened.evaluate("performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    assert not opened.console
    opened.resize(420, 900)
    opened.wait_for("document.documentElement.scrollWidth <= 420")
    opened.resize(1280, 900)


@pytest.mark.slow
def test_choosing_a_class_changes_curves_and_gallery(opened, page):
    content = json.loads((page.parent / "report.json").read_text())
    opened.evaluate("choose('1')")
    ious = opened.evaluate("[...document.querySelector('[data-figure=ious]').data[0].y]")
    expected = [round(x, 1) for x in content["classes"][1]["ap_by_iou"].values()]
    assert ious == pytest.approx(expected, abs=0.051)
    shown = "[...document.querySelectorAll('.gallery li')].filter(x => !x.hidden)"
    classes = opened.evaluate(f"{shown}.map(x => x.dataset.classes)")
    assert classes and all("1" in value.split() for value in classes)
    opened.evaluate("choose('')")
    assert opened.evaluate(f"{shown}.length") >= len(classes)


@pytest.mark.slow
def test_tables_are_sorted_by_a_click(opened):
    rows = (
        "[...document.querySelectorAll('#by-class tbody tr')].map(r => r.children[{}].textContent)"
    )
    click = "document.querySelectorAll('#by-class th button')[{}].click()"
    opened.evaluate(click.format(2))
    ap = [float(x) for x in opened.evaluate(rows.format(2))]
    assert ap == sorted(ap, reverse=True)
    opened.evaluate(click.format(2))
    assert [float(x) for x in opened.evaluate(rows.format(2))] == sorted(ap)
    opened.evaluate(click.format(0))
    assert opened.evaluate(rows.format(0)) == sorted(NAMES)
