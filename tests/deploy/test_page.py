"""The page's files and its arithmetic. test_without_torch.py runs it in a browser."""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import tarfile
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.data import transforms as T
from PIL import Image, ImageOps

from retina_plugin.data.resizing import TorchvisionResizeShortestEdge
from retina_plugin.deploy.page import ONNXRUNTIME_WEB, fetch_onnxruntime_web, write_page
from retina_plugin.deploy.standalone import resize_without_antialias
from retina_plugin.errors import ConfigError
from retina_plugin.predict import Predictions
from tests.deploy.echo import NAMES, metadata, write_echo

RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


@pytest.fixture(scope="module")
def static(repo):
    return repo / "retina_plugin" / "deploy" / "page"


@pytest.fixture(scope="module")
def node(static, tmp_path_factory):
    """Runs the body of an async function of `input` on the page's modules; its JSON result."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("node is not here: the page's arithmetic is not tested")
    folder = tmp_path_factory.mktemp("node")
    for file in ("pixels.js", "model.js"):
        shutil.copy(static / file, folder)
    (folder / "package.json").write_text('{"type": "module"}')

    def run(body, value):
        (folder / "run.js").write_text(
            'import * as pixels from "./pixels.js"; import * as model from "./model.js";\n'
            'import fs from "fs";\n'
            'const bytes = (text) => new Uint8Array(Buffer.from(text, "base64"));\n'
            'const text = (array) => Buffer.from(array.buffer, array.byteOffset, array.byteLength)'
            '.toString("base64");\n'
            f"const work = async (input) => {{ {body} }};\n"
            "const input = JSON.parse(fs.readFileSync(0));\n"
            "process.stdout.write(JSON.stringify(await work(input)));"
        )
        done = subprocess.run(
            [program, folder / "run.js"],
            input=json.dumps(value),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def encoded(content):
    return base64.b64encode(content).decode()


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# ---- what a browser loads ------------------------------------------------------------------------


def test_no_file_names_an_outside_host(static):
    names = {file.name for file in static.iterdir()}
    assert {"index.html", "page.css", "page.js", "worker.js"} <= names
    for file in static.iterdir():
        # the name of the format, which is no address
        text = file.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"//[\w-]+(\.[\w-]+)+|https?:|wss?:|ftp:", text), file.name


class _Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_policy_allows_this_origin_only(static):
    tags = _Tags((static / "index.html").read_text()).tags
    (policy,) = (a["content"] for _, a in tags if "http-equiv" in a)
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives.pop("default-src") == "'none'"
    values = {value for text in directives.values() for value in text.split()}
    assert values == {"'self'", "'none'", "'wasm-unsafe-eval'", "blob:"}
    assert directives["connect-src"] == "'self'" and directives["form-action"] == "'none'"
    # what the policy would block
    for tag, attributes in tags:
        assert tag != "style" and "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        assert tag != "script" or "src" in attributes


def test_every_file_that_is_asked_for_is_there(static):
    names = {file.name for file in static.iterdir()} | set(RUNTIME) | {"models.json"}
    for file in static.glob("*.js"):
        text = file.read_text()
        asked = re.findall(r'from "\./([^"]+)"|new URL\("([^"]+)"|fetchOk\("([^"]+)"\)', text)
        assert {name for group in asked for name in group if name} <= names, file.name
    for _, attributes in _Tags((static / "index.html").read_text()).tags:
        for key in ("src", "href"):
            assert attributes.get(key, "index.html") in names


def test_every_input_has_a_label(static):
    """What a screen reader says."""
    text = (static / "index.html").read_text()
    tags = _Tags(text).tags
    labelled = {a.get("for") for tag, a in tags if tag == "label"}
    for tag, attributes in tags:
        if tag == "input":
            inside = re.search(rf'<label[^>]*>\s*<input id="{attributes["id"]}"', text)
            assert inside or attributes["id"] in labelled or "aria-label" in attributes


# ---- pixels --------------------------------------------------------------------------------------


def resized(node, cases, resampler):
    body = """return input.map(({data, height, width, newHeight, newWidth, resampler}) =>
        text(pixels.resize({data: bytes(data), width, height}, newWidth, newHeight, resampler).data))"""
    values = [
        {
            "data": encoded(image.tobytes()),
            "height": image.shape[0],
            "width": image.shape[1],
            "newHeight": new[0],
            "newWidth": new[1],
            "resampler": resampler,
        }
        for image, new in cases
    ]
    return [
        np.frombuffer(base64.b64decode(data), np.uint8).reshape(*new, 3)
        for data, (_, new) in zip(node(body, values), cases)
    ]


def cases(number):
    """Images and new sizes: any, of the same shape, tall ones, and one side unchanged."""
    draw = np.random.default_rng(3)
    result = []
    for i in range(number):
        height, width, new_height, new_width = draw.integers(1, 130, 4).tolist()
        if i % 4 == 1:
            scale = draw.uniform(0.2, 3)
            new_height, new_width = (max(1, round(x * scale)) for x in (height, width))
        elif i % 4 == 2:
            height, new_height = height + 300, max(1, new_height // 3)
        elif i % 4 == 3:
            new_width = width
        result.append((pixels(height, width, 3, seed=i), (new_height, new_width)))
    return result


def test_resize_equals_pillow_to_the_bit(node):
    images = cases(60)
    for ours, (image, new) in zip(resized(node, images, "pillow"), images):
        pillow = Image.fromarray(image).resize(new[::-1], Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(ours, np.asarray(pillow))


def test_resize_equals_torch_to_the_bit(node):
    images = cases(60)
    for ours, (image, new) in zip(resized(node, images, "torch"), images):
        batch = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
        torchs = F.interpolate(batch, new, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
        np.testing.assert_array_equal(ours, torchs.numpy())


def test_input_of_torchvision_and_channel_order(node):
    image = pixels(37, 61, 3)
    for order in ("RGB", "BGR"):
        record = json.loads(metadata(resize="torchvision", format=order, min_size=90).to_json())
        value = {"data": encoded(image.tobytes()), "height": 37, "width": 61, "record": record}
        body = """const {data, width, height, record} = input;
            const made = model.toInput({data: bytes(data), width, height}, record);
            return {...made, data: text(made.data)}"""
        made = node(body, value)
        assert (made["height"], made["width"]) == (90, 148)
        ours = np.frombuffer(base64.b64decode(made["data"]), np.float32).reshape(3, 90, 148)
        expected = resize_without_antialias(image, 90, 148).transpose(2, 0, 1)
        expected = expected[::-1] if order == "BGR" else expected
        np.testing.assert_allclose(ours, expected, atol=1e-3)


def test_sizes_are_those_of_the_test_augmentation(node):
    draw = np.random.default_rng(0)
    images = draw.integers(1, 3000, (300, 2)).tolist()
    limits = [(800, 1333), (160, 1333), (37, 50), (0, 1333)]
    value = [
        {"height": h, "width": w, "record": {"min_size": short, "max_size": longest, "resize": kind}}
        for h, w in images
        for short, longest in limits
        for kind in ("detectron2", "torchvision")
    ]
    body = "return input.map(({height, width, record}) => model.testSize(width, height, record))"
    for case, (width, height) in zip(value, node(body, value)):
        record = case["record"]
        old = (case["height"], case["width"])
        if record["min_size"] == 0:
            expected = old
        elif record["resize"] == "detectron2":
            expected = T.ResizeShortestEdge.get_output_shape(
                *old, record["min_size"], record["max_size"]
            )
        else:
            augment = TorchvisionResizeShortestEdge(record["min_size"], record["max_size"])
            transform = augment.get_transform(np.empty((*old, 0)))
            expected = (transform.new_h, transform.new_w)
        assert (height, width) == tuple(expected), case


def png(image, **options):
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    return stream.getvalue()


def interlaced(image):
    """OpenCV and Pillow write none: the filters of each pass are all 0 here."""
    height, width = image.shape[:2]
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = b"".join(
        b"\0" + row.tobytes()
        for x, y, dx, dy in passes
        for row in image[y::dy, x::dx]
        if row.size
    )

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_png_equals_pillow(node):
    """Of all kinds of pixels, also below transparency, and upright."""
    rgb = Image.fromarray(pixels(29, 43, 3))
    smooth = Image.fromarray((np.add.outer(np.arange(64), np.arange(99)) % 256).astype(np.uint8))
    alpha = Image.fromarray(pixels(29, 43, 4, seed=5))
    exif = [Image.Exif() for _ in range(9)]
    for orientation, tags in enumerate(exif):
        tags[274] = orientation
    files = [
        png(rgb),
        png(rgb, compress_level=0),
        png(rgb.convert("L")),
        png(smooth),  # with other filters
        png(smooth.convert("RGB").rotate(30)),
        png(alpha),
        png(alpha.convert("LA")),
        png(rgb.convert("1")),
        *(png(rgb.quantize(colours)) for colours in (2, 4, 16, 256)),
        png(rgb.quantize(16), transparency=3),
        png(rgb, transparency=(1, 2, 3)),
        *(png(rgb, exif=tags) for tags in exif),
        interlaced(pixels(29, 43, 3)),
        interlaced(pixels(3, 2, 3)),
    ]
    body = """return Promise.all(input.map(async (file) => {
        const image = await pixels.decodePng(bytes(file));
        return {...image, data: text(image.data)}; }))"""
    for file, made in zip(files, node(body, [encoded(file) for file in files]), strict=True):
        ours = np.frombuffer(base64.b64decode(made["data"]), np.uint8)
        with Image.open(io.BytesIO(file)) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        np.testing.assert_array_equal(ours.reshape(made["height"], made["width"], 3), expected)


def test_damaged_png_is_one_line(node):
    good = png(Image.fromarray(pixels(29, 43, 3)))
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    deep = png(Image.fromarray(np.zeros((5, 5), np.uint16)))
    bad = [good[:200], good[:8], bytes(flipped), good[:-40] + good[-12:], deep]
    body = """return Promise.all(input.map((file) =>
        pixels.decodePng(bytes(file)).then(() => "", (error) => error.message)))"""
    lines = node(body, [encoded(file) for file in bad])
    assert lines == ["it is damaged"] * 4 + ["it has 16 bits a pixel: convert it to 8 bit"]


# ---- models and detections -----------------------------------------------------------------------


def test_metadata_is_read_from_the_file(node, tmp_path):
    path = write_echo(tmp_path / "model.onnx")
    read = node("return model.readMetadata(bytes(input))", encoded(path.read_bytes()))
    assert read == json.loads(metadata().to_json())


def test_models_that_the_page_cannot_run_are_one_line(node, tmp_path):
    def echo(*args, **changes):
        return write_echo(tmp_path / "model.onnx", *args, **changes).read_bytes()

    bad = {
        "it is no ONNX file": [b"\xff\xd8\xff\xe0 a picture", b"\0" * 50, echo()[:-5]],
        "it has no metadata of retina_plugin": [echo(""), b""],
        "its metadata cannot be read": [echo("{")],
        "its metadata has version 2": [echo('{"version": 2}')],
        "it was exported with --output-stage head": [echo(stage="head")],
    }
    body = """return input.map((file) => {
        try { model.readMetadata(bytes(file)); return "no error" } catch (error) { return error.message } })"""
    for message, files in bad.items():
        for line in node(body, [encoded(file) for file in files]):
            assert line.startswith(message) and "\n" not in line


@pytest.mark.parametrize("ids", [(7, 8, 9), None])
def test_coco_entries_are_those_of_predictions(ids, node):
    record = json.loads(metadata(category_ids=ids).to_json())
    draw = np.random.default_rng(0)
    boxes = np.sort(draw.uniform(-20, 120, (9, 2, 2)), axis=1).reshape(-1, 4).astype(np.float32)
    scores, classes = np.sort(draw.random(9))[::-1].astype(np.float32), draw.integers(0, 3, 9)
    classes[-2:] = -1  # padding
    value = {"boxes": boxes.ravel().tolist(), "scores": scores.tolist(), "classes": classes.tolist()}
    body = """const image = {width: 333, height: 222}, made = {width: 100, height: 67};
        const found = model.toDetections(Float32Array.from(input.boxes),
            Float32Array.from(input.scores), BigInt64Array.from(input.classes.map(BigInt)), image, made,
            input.record);
        return [found, model.toCoco(found, input.record, "000139.jpg")]"""
    found, entries = node(body, {**value, "record": record})
    scale = np.array([333 / 100, 222 / 67] * 2, np.float32)
    expected = (boxes * scale).clip(0, np.array([333, 222] * 2, np.float32))
    keep = (classes >= 0) & (expected[:, 2:] > expected[:, :2]).all(axis=1)
    same = Predictions(expected[keep], scores[keep], classes[keep], (222, 333), NAMES, ids, "000139.jpg")
    assert entries == same.to_coco(139)
    assert [entry["classId"] for entry in found] == classes[keep].tolist()


# ---- the folder ----------------------------------------------------------------------------------


def package(path, name="onnxruntime-web", files=RUNTIME):
    """An npm package of this name; its files hold their own names."""
    with tarfile.open(path, "w:gz") as archive:
        about = json.dumps({"name": name, "version": "0.0.1"}).encode()
        for file, content in {
            "package.json": about,
            **{f"dist/{file}": file.encode() for file in files},
        }.items():
            info = tarfile.TarInfo(f"package/{file}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_folder_has_the_page_the_model_and_the_runtime(static, tmp_path):
    model = write_echo(tmp_path / "birds.onnx")
    second = write_echo(tmp_path / "birds_int8.onnx", quantized="int8")
    runtime = package(tmp_path / "web.tgz")
    index = write_page(model, tmp_path / "out", onnxruntime_web=runtime, second=second)
    assert index == tmp_path / "out" / "index.html"
    names = {file.name for file in static.iterdir()}
    expected = names | set(RUNTIME) | {"models.json", "model.onnx", "second.onnx"}
    assert {path.name for path in index.parent.iterdir()} == expected
    assert (index.parent / "model.onnx").read_bytes() == model.read_bytes()
    assert (index.parent / RUNTIME[0]).read_text() == RUNTIME[0]
    assert json.loads((index.parent / "models.json").read_text()) == [
        {"file": "model.onnx", "name": "birds"},
        {"file": "second.onnx", "name": "birds_int8"},
    ]
    # again, of the model that lies in the folder, and without the second
    write_page(index.parent / "model.onnx", index.parent, onnxruntime_web=runtime)
    assert {path.name for path in index.parent.iterdir()} == expected - {"second.onnx"}
    assert (index.parent / "model.onnx").read_bytes() == model.read_bytes()


def test_models_that_no_page_can_run_are_refused(tmp_path):
    runtime = package(tmp_path / "web.tgz")
    good = write_echo(tmp_path / "good.onnx")
    boxes = write_echo(tmp_path / "boxes.onnx", stage="boxes")
    other = write_echo(tmp_path / "other.onnx", "")
    for bad, message in [
        (boxes, "boxes.onnx was exported with --output-stage boxes: a page needs the stage nms"),
        (other, "other.onnx has no metadata of retina_plugin"),
        (tmp_path / "missing.onnx", "missing.onnx does not exist"),
    ]:
        for arguments in ({"model": bad}, {"model": good, "second": bad}):
            with pytest.raises(ConfigError, match=message):
                write_page(output=tmp_path / "out", onnxruntime_web=runtime, **arguments)
    assert not (tmp_path / "out").exists()


def test_packages_that_are_not_onnxruntime_web_are_refused(tmp_path):
    model = write_echo(tmp_path / "model.onnx")
    (tmp_path / "text.tgz").write_text("hello")
    cut = package(tmp_path / "cut.tgz")
    cut.write_bytes(cut.read_bytes()[:-50])
    for bad, message in [
        (tmp_path / "missing.tgz", "--onnxruntime-web: .*missing.tgz does not exist"),
        (tmp_path / "text.tgz", "is no npm package, or damaged"),
        (cut, "is no npm package, or damaged"),
        (tmp_path, "is no npm package, or damaged"),
        (package(tmp_path / "vue.tgz", "vue"), "is the package vue"),
        (package(tmp_path / "few.tgz", files=RUNTIME[1:]), "few.tgz lacks .*ort.wasm.min.mjs"),
    ]:
        with pytest.raises(ConfigError, match=message):
            write_page(model, tmp_path / "out", onnxruntime_web=bad)
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_written_is_one_line(tmp_path):
    model = write_echo(tmp_path / "model.onnx")
    with pytest.raises(ConfigError, match="--page: cannot write .*model.onnx"):
        write_page(model, model, onnxruntime_web=package(tmp_path / "web.tgz"))


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """Puts a shell script in the place of npm, and an empty cache in that of the user's."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("RETINA_PLUGIN_CACHE", str(tmp_path / "cache"))

    def install(script):
        (programs / "npm").write_text(f"#!/bin/sh\n{script}\n")
        (programs / "npm").chmod(0o755)

    return install


def test_package_is_fetched_once_and_checked(npm, tmp_path):
    content = package(tmp_path / "web.tgz").read_bytes()
    name = f"onnxruntime-web-{ONNXRUNTIME_WEB}.tgz"
    npm(f'echo "$*" >>{tmp_path}/calls; cp {tmp_path}/web.tgz {name}')
    cached = tmp_path / "cache" / name
    with pytest.raises(ConfigError, match="has another SHA-512 than the published one"):
        fetch_onnxruntime_web()
    assert not cached.exists()
    for _ in range(2):
        assert fetch_onnxruntime_web(encoded(hashlib.sha512(content).digest())) == cached
        assert cached.read_bytes() == content
    assert (tmp_path / "calls").read_text().count(f"pack onnxruntime-web@{ONNXRUNTIME_WEB}") == 2


def test_npm_that_fails_is_one_line_with_the_way_out(npm, monkeypatch):
    npm("echo 'npm error code EAI_AGAIN' >&2; echo more >&2; exit 1")
    with pytest.raises(ConfigError, match="npm error code EAI_AGAIN.*--onnxruntime-web"):
        fetch_onnxruntime_web()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="needs npm .*not here: .*--onnxruntime-web"):
        fetch_onnxruntime_web()
