"""The page's arithmetic, run by node: pixels, metadata and detections."""

import base64
import io
import json
import shutil
import struct
import subprocess
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.data import transforms as T
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from retina_plugin.data.resizing import TorchvisionResizeShortestEdge
from retina_plugin.deploy.standalone import resize_without_antialias
from retina_plugin.predict import Predictions
from tests.deploy.echo import NAMES, metadata, write_echo


@pytest.fixture(scope="module")
def node(repo, tmp_path_factory):
    """Runs the body of an async function of `input` on the page's modules; its JSON result."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("node is not here: the page's arithmetic is not tested")
    folder = tmp_path_factory.mktemp("node")
    for file in ("pixels.js", "model.js"):
        shutil.copy(repo / "retina_plugin" / "deploy" / "page" / file, folder)
    (folder / "package.json").write_text('{"type": "module"}')

    def run(body, value):
        (folder / "run.js").write_text(
            'import * as pixels from "./pixels.js"; import * as model from "./model.js";\n'
            'import fs from "fs";\n'
            'const bytes = (text) => new Uint8Array(Buffer.from(text, "base64"));\n'
            "const text = (array) => Buffer.from(array.buffer, array.byteOffset, array.byteLength)"
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


# ---- pixels --------------------------------------------------------------------------------------


def resized(node, cases, resampler):
    body = """return input.map(({data, height, width, newHeight, newWidth, resampler}) =>
        text(pixels.resize({data: bytes(data), width, height}, newWidth, newHeight, resampler)
            .data))"""
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
        {
            "height": h,
            "width": w,
            "record": {"min_size": short, "max_size": longest, "resize": kind},
        }
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
    passes = [
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ]
    rows = b"".join(
        b"\0" + row.tobytes() for x, y, dx, dy in passes for row in image[y::dy, x::dx] if row.size
    )

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_png_equals_pillow(node):
    """Of all kinds of pixels, also below transparency, and upright."""
    rgb = Image.fromarray(pixels(29, 43, 3))
    photo = Image.fromarray(load_sample_images().images[0][150:250, 50:200])
    alpha = Image.fromarray(pixels(29, 43, 4, seed=5))
    exif = [Image.Exif() for _ in range(9)]
    for orientation, tags in enumerate(exif):
        tags[274] = orientation
    files = [
        png(rgb),
        png(rgb, compress_level=0),
        png(rgb.convert("L")),
        png(photo),  # with all filters
        png(photo.convert("L")),
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
    flipped[-13] ^= 1  # the checksum of the pixels
    deep = png(Image.fromarray(np.zeros((5, 5), np.uint16)))
    bad = [good[:200], good[:8], bytes(flipped), good[:-40] + good[-12:], deep]
    body = """return Promise.all(input.map((file) =>
        pixels.decodePng(bytes(file)).then(() => "", (error) => error.message)))"""
    lines = node(body, [encoded(file) for file in bad])
    assert lines == ["it is damaged"] * 4 + ["it has 16 bits a pixel: convert it to 8 bit"]


def test_transparent_contentof_a_canvas_are_one_line(node):
    """Its colours are rounded where they are multiplied by alpha, and lost where that is 0."""
    opaque = np.dstack([pixels(5, 7, 3), np.full((5, 7), 255, np.uint8)])
    body = """return input.map((content) => {
        try { return text(pixels.opaqueRgb(bytes(content))) } catch (error) { return error.message }
    })"""
    partly = opaque.copy()
    partly[4, 6, 3] = 254
    made, line = node(body, [encoded(image.tobytes()) for image in (opaque, partly)])
    assert base64.b64decode(made) == opaque[:, :, :3].tobytes()
    assert line == "a part of it is transparent: save it as PNG"


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
        "it was exported with an INPUT.MAPPER that": [echo(resampler="custom")],
    }
    body = """return input.map((file) => {
        try { model.readMetadata(bytes(file)); return "no error" }
        catch (error) { return error.message } })"""
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
    value = {
        "boxes": boxes.ravel().tolist(),
        "scores": scores.tolist(),
        "classes": classes.tolist(),
    }
    body = """const image = {width: 333, height: 222}, made = {width: 100, height: 67};
        const found = model.toDetections(Float32Array.from(input.boxes),
            Float32Array.from(input.scores), BigInt64Array.from(input.classes.map(BigInt)), image,
            made, input.record);
        return [found, model.toCoco(found, input.record, "000139.jpg")]"""
    found, entries = node(body, {**value, "record": record})
    scale = np.array([333 / 100, 222 / 67] * 2, np.float32)
    expected = (boxes * scale).clip(0, np.array([333, 222] * 2, np.float32))
    keep = (classes >= 0) & (expected[:, 2:] > expected[:, :2]).all(axis=1)
    same = Predictions(
        expected[keep], scores[keep], classes[keep], (222, 333), NAMES, ids, "000139.jpg"
    )
    assert entries == same.to_coco(139)
    assert [entry["classId"] for entry in found] == classes[keep].tolist()
