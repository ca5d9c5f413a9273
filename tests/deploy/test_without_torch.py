"""An exported model without PyTorch, in Python and in a browser, against the predictor."""

import dataclasses
import functools
import http.server
import json
import shutil
import threading

import numpy as np
import onnx
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from sklearn.datasets import load_sample_images

from retina_plugin.deploy import load_exported, write_exported
from retina_plugin.deploy.dense import DenseModel
from retina_plugin.deploy.metadata import METADATA_KEY, describe_model
from retina_plugin.deploy.page import fetch_onnxruntime_web, write_page
from retina_plugin.deploy.standalone import Detector
from retina_plugin.engine import setup_cfg
from retina_plugin.errors import ConfigError
from retina_plugin.predict import RetinaPredictor
from tests.deploy.browser import Browser, find_browser
from tests.deploy.echo import write_echo

pytestmark = pytest.mark.slow

SCORE, BOX = 5e-6, 3e-4  # the largest differences, boxes in pixels
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "<b>nine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def cfg(repo):
    cfg = setup_cfg(str(repo / "configs" / "_base_" / "digits_R18.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.FPN.NORM = cfg.MODEL.RETINANET.NORM = ""
    return cfg


@pytest.fixture(scope="module")
def weights(cfg, folder):
    """Random weights whose scores are spread, as those of a trained model are."""
    torch.manual_seed(0)
    model = build_model(cfg)
    model.head.cls_score.weight.data.normal_(std=0.3)
    model.head.cls_score.bias.data.fill_(-2.0)
    path = folder / "weights.pth"
    torch.save({"model": model.state_dict(), "class_names": list(NAMES)}, path)
    return path


@pytest.fixture(scope="module")
def exported(cfg, weights, folder):
    model = build_model(cfg).eval()
    model.load_state_dict(torch.load(weights)["model"])
    dense = DenseModel(model).eval()
    about = {"class_names": NAMES, "category_ids": None, "divisibility": dense.divisibility}
    path = folder / "digits.onnx"
    write_exported(
        dense, describe_model(cfg, model.state_dict(), stage="nms", **about), path
    )
    return path


@pytest.fixture(scope="module")
def photos(folder):
    """Photos and parts of them: odd sizes, a turned one, a transparent one, a tiny one."""
    china, flower = load_sample_images().images
    alpha = np.random.default_rng(0).integers(0, 256, flower.shape[:2], dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(china).save(folder / "china.png")
    Image.fromarray(china[:401, :333]).save(folder / "000000000139.png")
    Image.fromarray(np.dstack([flower, alpha])).save(folder / "transparent.png")
    Image.fromarray(flower[5:38, :47]).save(folder / "tiny.png")
    Image.fromarray(china[:, :501]).save(folder / "turned.jpg", exif=exif, quality=92)
    names = ("china.png", "000000000139.png", "transparent.png", "tiny.png", "turned.jpg")
    return [folder / name for name in names]


def changed(source, target, **changes):
    """A copy of a model with other metadata."""
    model = onnx.load(source)
    record = dataclasses.replace(load_exported(source).metadata, **changes)
    (entry,) = (entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    entry.value = record.to_json()
    onnx.save(model, target)
    return target


def assert_equal(boxes, scores, classes, expected):
    """The same detections in the same order, but for the order of scores that are so close."""
    assert len(scores) == len(expected) > 0
    np.testing.assert_allclose(scores, expected.scores, rtol=0, atol=SCORE)
    for box, score, k in zip(boxes, scores, classes):
        close = np.abs(expected.scores - score) <= SCORE
        close &= expected.class_ids == k
        assert (np.abs(expected.boxes[close] - box) <= BOX).all(axis=1).any(), (box, score, k)


@pytest.mark.parametrize(
    "opts, changes",
    [
        ([], {}),
        (["INPUT.MAPPER", "DatasetMapper"], {"resampler": "pillow"}),
        (["INPUT.RESIZE", "torchvision"], {"resize": "torchvision"}),
        (["INPUT.MIN_SIZE_TEST", "333"], {"min_size": 333}),
        (["INPUT.MIN_SIZE_TEST", "0"], {"min_size": 0}),
    ],
    ids=["torch", "pillow", "torchvision", "larger", "not resized"],
)
def test_standalone_finds_what_the_predictor_finds(opts, changes, cfg, weights, exported, photos, tmp_path):
    predictor = RetinaPredictor.load(cfg, weights, opts=opts)
    detect = Detector(changed(exported, tmp_path / "model.onnx", **changes), threads=1)
    for photo in photos:
        found = detect(photo)
        expected = predictor(photo)
        assert_equal(found.boxes, found.scores, found.class_ids, expected)
        assert found.class_names == [NAMES[k] for k in found.class_ids]
        assert found.image_size == expected.image_size


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


class Server:
    """`python -m http.server --bind 127.0.0.1` in a thread, which counts its requests."""

    def __init__(self, folder):
        self.requests = 0
        owner = self

        class Handler(_Quiet):
            def do_GET(self):
                owner.requests += 1
                super().do_GET()

        handler = functools.partial(Handler, directory=folder)
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def site(exported, folder):
    """The page with the exported model."""
    try:
        runtime = fetch_onnxruntime_web()
    except ConfigError as error:
        pytest.skip(str(error))
    write_page(exported, folder / "site", onnxruntime_web=runtime)
    return folder / "site"


@pytest.fixture
def server(site):
    server = Server(site)
    yield server
    server.close()


@pytest.fixture
def browser(tmp_path):
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium is here: the page is not tested in a browser")
    with Browser(program, tmp_path / "browser") as browser:
        yield browser


READY = "document.querySelector('#loading')?.hidden"
DONE = "[...document.querySelectorAll('.facts')].every((facts) => / ms /.test(facts.innerText))"


def detect_in(browser, path):
    browser.evaluate("document.querySelectorAll('.facts').forEach((facts) => (facts.innerText = ''))")
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


def test_page_finds_what_the_predictor_finds(browser, server, cfg, weights, photos):
    predictor = RetinaPredictor.load(cfg, weights)
    browser.open(server.address)
    browser.wait_for(READY)
    set_score(browser, 0)  # the slider begins at the model's own threshold
    for photo in photos:
        detect_in(browser, photo)
        expected = predictor(photo)
        assert number_of_boxes(browser) == len(expected)
        entries = saved_json(browser)
        boxes = np.array([entry["bbox"] for entry in entries])
        boxes[:, 2:] += boxes[:, :2]
        classes = [entry["category_id"] for entry in entries]
        assert_equal(boxes, [entry["score"] for entry in entries], classes, expected)
        assert {entry["file_name"] for entry in entries} == {photo.name}
        assert [entry["category_name"] for entry in entries] == [NAMES[k] for k in classes]
        assert {entry["image_id"] for entry in entries} == {139 if photo.stem.isdecimal() else 1}
    assert browser.console == []


def test_filters_change_the_boxes_and_the_download(browser, server, cfg, weights, photos):
    found = RetinaPredictor.load(cfg, weights)(photos[0])
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
    left = [NAMES[k] for k in found.class_ids if k != most]
    assert [entry["category_name"] for entry in saved_json(browser)] == left
    browser.evaluate("document.querySelector('#none').click()")
    assert number_of_boxes(browser) == 0 and saved_json(browser) == []
    browser.evaluate("document.querySelector('#all').click()")
    assert number_of_boxes(browser) == len(found)
    # names are text, whatever they hold
    assert browser.evaluate("document.querySelectorAll('.boxes b, #classes b').length") == 0


def test_second_model_stands_beside_the_first(browser, server, photos, tmp_path):
    browser.open(server.address)
    browser.wait_for(READY)
    detect_in(browser, photos[0])
    browser.choose_files("#model", write_echo(tmp_path / "echo.onnx", quantized="int8"))
    browser.wait_for("document.querySelectorAll('figure').length === 2")
    browser.wait_for(DONE)
    set_score(browser, 0)
    assert number_of_boxes(browser, 0) > 0
    first, second = (
        browser.evaluate(f"document.querySelectorAll('figure')[{i}].getBoundingClientRect().toJSON()")
        for i in (0, 1)
    )
    assert first["top"] == second["top"] and first["right"] < second["left"]
    assert number_of_boxes(browser, 1) == 2
    assert {entry["category_name"] for entry in saved_json(browser, 1)} <= {"кошка", "dog"}
    caption = "document.querySelectorAll('figcaption')[1].innerText"
    assert {"echo", "int8"} <= set(browser.evaluate(caption).split())
    detect_in(browser, photos[1])  # both see the next picture, of which one box is outside
    assert number_of_boxes(browser, 0) > 0 and number_of_boxes(browser, 1) == 1
    browser.evaluate("document.querySelectorAll('.close')[0].click()")
    browser.wait_for("document.querySelectorAll('figure').length === 1")
    assert number_of_boxes(browser) == 1


def test_page_of_two_models_shows_both(browser, exported, site, photos, tmp_path):
    echo = write_echo(tmp_path / "echo.onnx")
    write_page(exported, tmp_path / "site", second=echo)
    server = Server(tmp_path / "site")
    browser.open(server.address)
    browser.wait_for(READY)
    detect_in(browser, photos[0])
    set_score(browser, 0)
    assert number_of_boxes(browser, 0) > 2 and number_of_boxes(browser, 1) == 2
    server.close()


def test_bad_files_are_one_line(browser, server, photos, tmp_path):
    browser.open(server.address)
    browser.wait_for(READY)
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes(photos[0].read_bytes()[:5000])
    (tmp_path / "text.onnx").write_text("hello")
    for selector, file, line in [
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
    image = f"new Promise((r) => {{ const i = new Image(); i.onload = i.onerror = r; i.src = '{outside.address}a.png'; }})"
    browser.evaluate(f"{image}.then(() => 1)")
    assert outside.requests == 0
    outside.close()


def test_page_without_a_server_says_so(browser, site):
    browser.open((site / "index.html").as_uri())
    visible = "getComputedStyle(document.querySelector('#unserved')).visibility === 'visible'"
    browser.wait_for(visible, seconds=10)
    text = browser.evaluate("document.querySelector('#unserved').innerText")
    assert "python -m http.server" in text
    assert browser.evaluate("document.querySelector('main').hidden")


def test_missing_file_is_one_line(browser, site, tmp_path):
    shutil.copytree(site, tmp_path / "site")
    for name, line in [("model.onnx", "model.onnx: 404"), ("ort.wasm.min.mjs", "worker.js or a file")]:
        (tmp_path / "site" / name).rename(tmp_path / name)
        server = Server(tmp_path / "site")
        browser.open(server.address)
        assert error_line(browser).startswith("The model cannot be loaded: " + line)
        server.close()
        (tmp_path / name).rename(tmp_path / "site" / name)
