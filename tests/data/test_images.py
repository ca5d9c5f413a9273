"""Images that Detectron2 reads wrongly without a word, or fails on without the file's name."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from detectron2.data import detection_utils
from PIL import Image

from retina_plugin.data import DATASET_MAPPER_REGISTRY, jpeg
from retina_plugin.data.images import BadImageError, check_image_size, check_readable, read_image

SIZE = 96


@pytest.fixture(scope="module")
def pixels():
    """(96, 96, 3) uint8 with gradients and noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE]
    smooth = np.stack([x * 2, y * 2, x + y], axis=2)
    return (smooth + rng.integers(0, 40, smooth.shape)).clip(0, 255).astype(np.uint8)


def encode(image, kind="JPEG", **options):
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(values):
    return encode(Image.fromarray(values), "TIFF")


WRONG_MODES = {
    "16-bit PNG": lambda p: encode(Image.fromarray(p[..., 0].astype(np.uint16) * 256), "PNG"),
    "16-bit TIFF": lambda p: tiff(p[..., 0].astype(np.uint16) * 256),
    "32-bit TIFF": lambda p: tiff(p[..., 0].astype(np.int32) * 65536),
    "float TIFF from 0 to 1": lambda p: tiff(p[..., 0].astype(np.float32) / 255),
    "big-endian 16-bit TIFF": lambda p: encode(
        Image.frombytes(
            "I;16B", (SIZE, SIZE), (p[..., 0].astype(np.uint16) * 256).astype(">u2").tobytes()
        ),
        "TIFF",
    ),
}


@pytest.mark.parametrize("reader", [read_image, check_readable])
@pytest.mark.parametrize("kind", WRONG_MODES)
def test_mode_that_is_read_wrongly_raises(tmp_path, pixels, kind, reader):
    """Detectron2 makes every pixel white or black of them. The line has the file and the mode."""
    path = tmp_path / "image"
    path.write_bytes(WRONG_MODES[kind](pixels))
    expected = detection_utils.read_image(str(path), "BGR")
    assert expected.min() > 250 or expected.max() < 5 or np.isin(expected, [0, 255]).all()
    with pytest.raises(BadImageError) as error:
        reader(str(path), "BGR")
    text = str(error.value)
    assert str(path) in text and "Pillow's mode " in text and "convert it to 8 bit" in text


def test_more_bits_can_be_asked_for(tmp_path, pixels):
    """INPUT.FORMAT I and F are Pillow's modes, in which the values are right."""
    values = pixels[..., 0].astype(np.int32) * 65536
    path = tmp_path / "image"
    path.write_bytes(tiff(values))
    assert np.array_equal(read_image(str(path), "I"), values)


def png_of_16_bit_colours(pixels):
    """Pillow cannot write one."""
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in pixels)

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", SIZE, SIZE, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


RIGHT = {
    "16-bit colours": png_of_16_bit_colours,  # Pillow keeps the upper 8 bits
    "palette": lambda p: encode(Image.fromarray(p).convert("P"), "PNG"),
    "alpha": lambda p: encode(Image.fromarray(p).convert("RGBA"), "PNG"),
    "grey": lambda p: encode(Image.fromarray(p).convert("L"), "PNG"),
    "grey JPEG": lambda p: encode(Image.fromarray(p).convert("L")),
    "CMYK JPEG": lambda p: encode(Image.fromarray(p).convert("CMYK")),
    "progressive JPEG": lambda p: encode(p, progressive=True),
    "JPEG with restart markers": lambda p: encode(p, restart_marker_blocks=2),
    "BMP": lambda p: encode(p, "BMP"),
    "GIF": lambda p: encode(p, "GIF"),
    "WebP": lambda p: encode(p, "WEBP", lossless=True),
    "TIFF": lambda p: encode(p, "TIFF"),
    "one bit": lambda p: encode(Image.fromarray(p).convert("1"), "PNG"),
    "JPEG filled up with zeros": lambda p: encode(p)[:-2] + b"\0" * 400 + b"\xff\xd9",
    "JPEG with 4 bytes too many": lambda p: encode(p)[:-2] + b"\1\2\3\4" + b"\xff\xd9",
    "JPEG with bytes behind its end": lambda p: encode(p) + b"more",
}


@pytest.mark.parametrize("image_format", ["BGR", "RGB", "YUV-BT.601", "L"])
@pytest.mark.parametrize("kind", RIGHT)
def test_right_images_are_read_as_detectron2_reads_them(
    tmp_path, pixels, capfd, kind, image_format
):
    """Equal pixels, and nothing on the standard error."""
    path = tmp_path / "image"
    path.write_bytes(RIGHT[kind](pixels))
    expected = detection_utils.read_image(str(path), image_format)
    assert np.array_equal(read_image(str(path), image_format), expected)
    check_readable(str(path), image_format)
    assert capfd.readouterr().err == ""


def middle(data, count=40):
    """The data with bytes in the middle overwritten."""
    start = len(data) // 2
    return data[:start] + bytes(range(1, count + 1)) + data[start + count :]


def half(data):
    """The data's first half with an end marker."""
    return data[: len(data) // 2] + b"\xff\xd9"


def gap(data):
    """The data without a part in the middle."""
    return data[: len(data) // 2] + data[2 * len(data) // 3 :]


DAMAGED = {
    "truncated with an end marker": lambda p: half(encode(p)),
    "overwritten in the middle": lambda p: middle(encode(p, quality=95)),
    "a part missing": lambda p: gap(encode(p)),
    "progressive, a part missing": lambda p: gap(encode(p, progressive=True)),
    "restart markers, a part missing": lambda p: gap(encode(p, restart_marker_blocks=2)),
    "grey, truncated": lambda p: half(encode(Image.fromarray(p).convert("L"))),
    "CMYK, truncated": lambda p: half(encode(Image.fromarray(p).convert("CMYK"))),
}


@pytest.mark.parametrize("image_format", ["BGR", "YUV-BT.601"])
@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_jpeg_raises(tmp_path, pixels, capfd, kind, image_format):
    """libjpeg's warning gets the file's name. Detectron2 trains on what is left of the image."""
    path = tmp_path / "image.jpg"
    path.write_bytes(DAMAGED[kind](pixels))
    assert detection_utils.read_image(str(path), image_format).shape[:2] == (SIZE, SIZE)
    for reader in (read_image, check_readable):
        with pytest.raises(BadImageError) as error:
            reader(str(path), image_format)
        text = str(error.value)
        assert text.startswith(f"the image {path} is damaged (") and "\n" not in text
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("position", [0.3, 0.5, 0.9])
def test_damaged_png_raises(tmp_path, pixels, position):
    """Every chunk of a PNG has a checksum."""
    data = bytearray(encode(pixels, "PNG"))
    data[int(position * len(data))] ^= 0xFF
    path = tmp_path / "image.png"
    path.write_bytes(data)
    assert detection_utils.read_image(str(path), "BGR").shape[:2] == (SIZE, SIZE)
    with pytest.raises(BadImageError, match="cannot read the image .*image.png"):
        read_image(str(path), "BGR")


def test_other_lines_on_the_standard_error_stay(capfd):
    """Only libjpeg's lines are taken."""
    with jpeg._captured_stderr() as lines:
        os.write(2, b"mine\nCorrupt JPEG data: x\n")
    assert lines == [b"mine", b"Corrupt JPEG data: x"]
    assert jpeg.decode_jpeg(b"no image", 1) == (None, "")
    os.write(2, b"after\n")
    assert capfd.readouterr().err.endswith("after\n")


def test_reading_without_a_standard_error(tmp_path, pixels):
    """Of a daemon, for example."""
    path = tmp_path / "image.jpg"
    path.write_bytes(encode(pixels))
    expected = read_image(str(path), "BGR")
    saved = os.dup(2)
    os.close(2)
    try:
        image = read_image(str(path), "BGR")
    finally:
        os.dup2(saved, 2)
        os.close(saved)
    assert np.array_equal(image, expected)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_turned_image_with_the_size_of_its_file_raises(tmp_path, orientation):
    """A camera's EXIF tag turns the image; the record has the size that it had before."""
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / "image.jpg"
    path.write_bytes(encode(Image.new("RGB", (40, 20)), exif=exif))
    image = read_image(str(path), "BGR")
    record = {"file_name": str(path), "width": 40, "height": 20}
    if orientation in (1, 3):
        check_image_size(record, image)
        return
    check_image_size(record | {"width": 20, "height": 40}, image)
    with pytest.raises(BadImageError, match="20x40 pixels because its EXIF orientation turns it"):
        check_image_size(record, image)
    with pytest.raises(BadImageError, match="20x40 pixels, but its record has width 20 and hei"):
        check_image_size(record | {"width": 20}, image)


def test_missing_size_is_filled_in():
    """As Detectron2 does it."""
    record = {"file_name": "a"}
    check_image_size(record, np.zeros((2, 3, 3)))
    assert (record["width"], record["height"]) == (3, 2)


@pytest.mark.parametrize("mapper", ["FastMapper", "DatasetMapper"])
@pytest.mark.parametrize("is_train", [True, False])
def test_yuv_images_are_in_the_precision_of_the_weights(
    tiny_cfg, tmp_path, pixels, mapper, is_train
):
    """Detectron2 makes float64 of them, which no float32 convolution takes."""
    path = tmp_path / "image.png"
    path.write_bytes(encode(pixels, "PNG"))
    tiny_cfg.INPUT.FORMAT, tiny_cfg.INPUT.MAPPER = "YUV-BT.601", mapper
    tiny_cfg.INPUT.MIN_SIZE_TRAIN, tiny_cfg.INPUT.MIN_SIZE_TEST = (0,), 0
    tiny_cfg.INPUT.RANDOM_FLIP = "none"
    record = {"file_name": str(path), "width": SIZE, "height": SIZE, "annotations": []}
    image = DATASET_MAPPER_REGISTRY.build(tiny_cfg, is_train)(record)["image"]
    expected = detection_utils.read_image(str(path), "YUV-BT.601")
    assert image.dtype == torch.float32
    assert np.array_equal(image.numpy(), expected.transpose(2, 0, 1).astype(np.float32))
