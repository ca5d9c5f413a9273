"""The page in a headless Chromium: what it finds, shows and sends."""

import functools
import http.server
import json
import shutil
import threading

import numpy as np
import pytest
from PIL import Image

from retina_plugin.deploy.page import fetch_onnxruntime_web, write_page
from retina_plugin.errors import ConfigError
from tests.deploy.browser import Browser, find_browser
from tests.deploy.detections import assert_same_detections
from tests.deploy.echo import write_echo

pytestmark = pytest.mark.slow


class Server:
    """`python -m http.server --bind 127.0.0.1` in a thread, which counts its requests."""

    def __init__(self, folder):
        self.requests = 0
        owner = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self):
                owner.requests += 1
                super().do_GET()

            def log_message(self, *args):
                pass

        handler = functools.partial(Handler, directory=folder)
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def program():
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium is here: the page is not tested in a browser")
    return program


@pytest.fixture(scope="module")
def runtime(program):
    """The npm package, before a model is exported for it."""
    try:
        return fetch_onnxruntime_web()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def site(runtime, exported_onnx, tmp_path_factory):
    """The page with the exported model."""
    folder = tmp_path_factory.mktemp("site")
    return write_page(exported_onnx[0], folder, onnxruntime_web=runtime).parent


@pytest.fixture
def server(site):
    server = Server(site)
    yield server
    server.close()


@pytest.fixture
def browser(program, tmp_path):
    with Browser(program, tmp_path / "browser") as browser:
        yield browser


READY = "document.querySelector('#loading')?.hidden"
DONE = "[...document.querySelectorAll('.facts')].every((facts) => / ms /.test(facts.innerText))"


def detect_in(browser, path):
    browser.evaluate(
        "document.querySelectorAll('.facts').forEach((facts) => (facts.innerText = ''))"
    )
    browser.choose_files("#picture", path)
    browser.wait_for(DONE)


def number_of_boxes(browser, model=0):
    return browser.evaluate(
        f"document.querySelectorAll('figure')[{model}].querySelectorAll('.box').length"
    )


def set_score(browser, score):
    browser.evaluate(
        "(() => { const slider = document.querySelector('#score'); "
        f"slider.value = {score}; slider.dispatchEvent(new Event('input')); }})()"
    )


def saved_json(browser, model=0):
    """What the button downloads."""
    before = set(browser.downloads.glob("*.json"))
    browser.evaluate(f"document.querySelectorAll('.save')[{model}].click()")
    for _ in range(200):
        browser.evaluate("new Promise((resolve) => setTimeout(resolve, 50))")
        new = set(browser.downloads.glob("*.json")) - before
        if new:
            (file,) = new
            entries = json.loads(file.read_text("utf-8"))
            file.unlink()
            return entries
    raise AssertionError("nothing was downloaded")


def error_line(browser):
    return browser.wait_for(
        "document.querySelector('#error').hidden ? '' : document.querySelector('#error').innerText"
    )


def test_page_finds_what_the_predictor_finds(browser, server, predictor, photos):
    predict = predictor()
    browser.open(server.address)
    browser.wait_for(READY)
    set_score(browser, 0)  # the slider begins at the model's own threshold
    for photo in photos:
        detect_in(browser, photo)
        expected = predict(photo)
        assert number_of_boxes(browser) == len(expected)
        entries = saved_json(browser)
        boxes = np.array([entry["bbox"] for entry in entries])
        boxes[:, 2:] += boxes[:, :2]
        classes = [entry["category_id"] for entry in entries]
        assert_same_detections(boxes, [entry["score"] for entry in entries], classes, expected)
        assert {entry["file_name"] for entry in entries} == {photo.name}
        assert [entry["category_name"] for entry in entries] == expected.class_names
        assert {entry["image_id"] for entry in entries} == {139 if photo.stem.isdecimal() else 1}
    assert browser.console == []


def test_filters_change_the_boxes_and_the_download(browser, server, predictor, photos):
    found = predictor()(photos[0])
    browser.open(server.address)
    browser.wait_for(READY)
    detect_in(browser, photos[0])
    numbers = set()
    for score in (*np.quantile(found.scores, (0.2, 0.5, 0.9)).round(2), 0.99):
        set_score(browser, score)
        shown = int((found.scores >= score).sum())
        numbers.add(shown)
        assert number_of_boxes(browser) == shown
        assert len(saved_json(browser)) == shown
    assert len(numbers) > 2
    set_score(browser, 0)
    most = np.bincount(found.class_ids).argmax()
    browser.evaluate(f"document.querySelectorAll('#classes input')[{most}].click()")
    left = [name for name, k in zip(found.class_names, found.class_ids) if k != most]
    assert [entry["category_name"] for entry in saved_json(browser)] == left
    browser.evaluate("document.querySelector('#none').click()")
    assert number_of_boxes(browser) == 0 and saved_json(browser) == []
    browser.evaluate("document.querySelector('#all').click()")
    assert number_of_boxes(browser) == len(found)


def test_pictures_can_be_dropped_and_pasted(browser, server):
    browser.open(server.address)
    browser.wait_for(READY)
    for event, name in (("drop", "dropped.png"), ("paste", "pasted.png")):
        browser.evaluate(
            """(async () => {
                const canvas = new OffscreenCanvas(120, 80);
                canvas.getContext("2d").fillRect(20, 20, 50, 50);
                const data = new DataTransfer();
                data.items.add(new File([await canvas.convertToBlob()], "NAME"));
                document.dispatchEvent("EVENT" === "drop"
                    ? new DragEvent("drop", {dataTransfer: data, cancelable: true})
                    : new ClipboardEvent("paste", {clipboardData: data}));
            })()""".replace("NAME", name).replace("EVENT", event)
        )
        browser.wait_for(f"document.querySelector('canvas')?.ariaLabel === '{name}' && {DONE}")
        assert browser.evaluate("document.querySelector('canvas').width") == 120


def test_second_model_stands_beside_the_first(browser, server, photos, tmp_path):
    browser.open(server.address)
    browser.wait_for(READY)
    detect_in(browser, photos[0])
    names = ("<b>bold</b>", "dog", "bird")
    echo = write_echo(tmp_path / "echo.onnx", quantized="int8", class_names=names)
    browser.choose_files("#model", echo)
    browser.wait_for("document.querySelectorAll('figure').length === 2")
    browser.wait_for(DONE)
    set_score(browser, 0)
    assert number_of_boxes(browser, 0) > 0
    first, second = (
        browser.evaluate(
            f"document.querySelectorAll('figure')[{i}].getBoundingClientRect().toJSON()"
        )
        for i in (0, 1)
    )
    assert first["top"] == second["top"] and first["right"] < second["left"]
    assert number_of_boxes(browser, 1) == 2
    assert {entry["category_name"] for entry in saved_json(browser, 1)} == set(names[:2])
    # names are text, whatever they hold
    assert browser.evaluate("document.querySelectorAll('.boxes b, #classes b').length") == 0
    caption = "document.querySelectorAll('figcaption')[1].innerText"
    assert {"echo", "int8"} <= set(browser.evaluate(caption).split())
    detect_in(browser, photos[1])  # both see the next picture, of which one box is outside
    assert number_of_boxes(browser, 0) > 0 and number_of_boxes(browser, 1) == 1
    browser.evaluate("document.querySelectorAll('.close')[0].click()")
    browser.wait_for("document.querySelectorAll('figure').length === 1")
    assert number_of_boxes(browser) == 1


def test_page_of_two_models_shows_both(browser, runtime, exported_onnx, photos, tmp_path):
    echo = write_echo(tmp_path / "echo.onnx")
    write_page(exported_onnx[0], tmp_path / "site", onnxruntime_web=runtime, second=echo)
    server = Server(tmp_path / "site")
    browser.open(server.address)
    browser.wait_for(READY)
    detect_in(browser, photos[0])
    set_score(browser, 0)
    assert number_of_boxes(browser, 0) > 2 and number_of_boxes(browser, 1) == 2
    # the second is closed while the first one detects
    browser.evaluate(
        """void new MutationObserver((changes, observer) => {
            if (document.querySelectorAll(".busy").length < 2) return;
            observer.disconnect();
            document.querySelectorAll(".close")[1].click();
        }).observe(document.body, { subtree: true, attributes: true })"""
    )
    detect_in(browser, photos[1])
    assert browser.evaluate("document.querySelectorAll('figure').length") == 1
    assert browser.evaluate("document.querySelector('#error').hidden")
    server.close()


def test_bad_files_are_one_line(browser, server, photos, tmp_path):
    browser.open(server.address)
    browser.wait_for(READY)
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes(photos[0].read_bytes()[:5000])
    (tmp_path / "text.onnx").write_text("hello")
    with Image.open(photos[2]) as image:
        image.save(tmp_path / "partly.webp", lossless=True)
    for selector, file, line in [
        ("#picture", tmp_path / "partly.webp", "partly.webp cannot be read: a part of it is trans"),
        ("#picture", tmp_path / "text.png", "text.png cannot be read: it is no image"),
        ("#picture", tmp_path / "cut.png", "cut.png cannot be read: it is damaged"),
        ("#model", tmp_path / "text.onnx", "text.onnx cannot be used: it is no ONNX file"),
        ("#model", write_echo(tmp_path / "other.onnx", ""), "other.onnx cannot be used: it has no"),
        ("#model", write_echo(tmp_path / "head.onnx", stage="head"), "head.onnx cannot be used"),
    ]:
        browser.choose_files(selector, file)
        assert error_line(browser).startswith(line)
        browser.evaluate("document.querySelector('#error button').click()")
    detect_in(browser, photos[0])  # it still works
    assert browser.evaluate("document.querySelector('#error').hidden")
    # after a picture that cannot be read, the last one is still there for a new model
    browser.choose_files("#picture", tmp_path / "text.png")
    assert error_line(browser).startswith("text.png cannot be read")
    browser.choose_files("#model", write_echo(tmp_path / "echo.onnx"))
    browser.wait_for("document.querySelectorAll('figure').length === 2")
    browser.wait_for(f"!document.querySelector('#error').hidden || {DONE}")
    assert browser.evaluate("document.querySelector('#error').hidden")


def test_nothing_leaves_the_origin(browser, server, photos, tmp_path):
    """All requests go to the page's server, and others are blocked, in the worker too."""
    browser.open(server.address)
    browser.wait_for(READY)
    detect_in(browser, photos[0])
    assert len(browser.requests) > 8
    for address in browser.requests:
        assert address.removeprefix("blob:").startswith(server.address), address
    outside = Server(tmp_path)
    (worker,) = browser.workers
    attempt = f"fetch('{outside.address}', {{mode: 'no-cors'}}).then(() => 'sent', () => 'blocked')"
    for session in (None, worker):
        assert browser.evaluate(attempt, session=session) == "blocked"
    browser.evaluate(
        "new Promise((done) => { const image = new Image(); image.onload = image.onerror = "
        f"() => done(1); image.src = '{outside.address}a.png'; }})"
    )
    assert outside.requests == 0
    outside.close()


def test_page_without_a_server_says_so(browser, site):
    browser.open((site / "index.html").as_uri())
    visible = "document.querySelector('#unserved').checkVisibility({visibilityProperty: true})"
    browser.wait_for(visible, seconds=10)
    text = browser.evaluate("document.querySelector('#unserved').innerText")
    assert "python -m http.server" in text
    assert browser.evaluate("document.querySelector('main').hidden")


def test_missing_file_is_one_line(browser, site, tmp_path):
    shutil.copytree(site, tmp_path / "site")
    for name, line in [
        ("model.onnx", "model.onnx: 404"),
        ("ort.wasm.min.mjs", "worker.js or a file"),
    ]:
        (tmp_path / "site" / name).rename(tmp_path / name)
        server = Server(tmp_path / "site")
        browser.open(server.address)
        assert error_line(browser).startswith("The model cannot be loaded: " + line)
        server.close()
        (tmp_path / name).rename(tmp_path / "site" / name)
