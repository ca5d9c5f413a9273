"""Reading images and making tensors of them, faster than Detectron2."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import IO, Any

import cv2
import numpy as np
import torch
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image, UnidentifiedImageError

from retina_plugin.errors import ConfigError

from .jpeg import decode_jpeg

__all__ = [
    "BadImageError",
    "check_format",
    "check_image_size",
    "check_readable",
    "image_suffixes",
    "image_to_tensor",
    "read_image",
]

# Only OpenCV functions that start no threads are used here: a data loader's worker is a fork, in
# which OpenCV's threads hang.


class BadImageError(ConfigError):
    """An image that cannot be read, or would be read wrongly: one line with the file and the fix.

    ``DATALOADER.ON_BAD_IMAGE`` says what a training does with it.
    """


def read_image(file_name: str, image_format: str) -> np.ndarray:
    """Detectron2's ``read_image``, with OpenCV as the decoder of colour and grey JPEGs.

    Pillow still reads the header, so that file type and orientation (EXIF, XMP) are the ones that
    Detectron2 sees. Both decoders are libjpeg-turbo, so pixels are equal. Detectron2's reader does
    the rest: PNG (OpenCV is hardly faster), CMYK and all other files, formats other than BGR and
    RGB, and truncated JPEGs, of which OpenCV 4 would return the part that it can decode.

    Detectron2 reads two kinds of files wrongly, without a word; here they are errors. Of a JPEG or
    PNG that is damaged inside it takes what the decoder makes of the rest. (A PNG has checksums. In
    a JPEG libjpeg notices about four of five random damages.) Of an image with more than 8 bits a
    pixel it takes every value above 255 for white.

    Args:
        file_name: a path, or a URL that Detectron2's ``PathManager`` can open.
        image_format: ``INPUT.FORMAT``.

    Returns:
        (H, W, C) image in ``image_format``: uint8 in [0, 255], float for YUV-BT.601.

    Raises:
        BadImageError: the file is missing, is not an image, is damaged, or has more than 8 bits a
            channel.
    """
    with _as_bad_image(file_name), PathManager.open(file_name, "rb") as file:
        data, orientation = _read_header(file, file_name, image_format)
        image = None
        if data is not None and orientation is not None:
            flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
            image = _decode_jpeg(data, file_name, flags)
        if image is not None and orientation is not None:
            image = _upright(image, orientation)
            return image[:, :, ::-1] if image_format == "RGB" else image
        image = detection_utils.read_image(file_name, image_format)
        if data is not None:
            _decode_jpeg(data, file_name, cv2.IMREAD_REDUCED_GRAYSCALE_8)
        return image


def check_readable(file_name: str, image_format: str) -> None:
    """Raise what :func:`read_image` would raise for a damaged file or a wrong mode.

    For readers that decode the file themselves.
    """
    with _as_bad_image(file_name), PathManager.open(file_name, "rb") as file:
        data, _ = _read_header(file, file_name, image_format)
        if data is not None:
            _decode_jpeg(data, file_name, cv2.IMREAD_REDUCED_GRAYSCALE_8)


@contextlib.contextmanager
def _as_bad_image(file_name: str) -> Iterator[None]:
    try:
        yield
    except BadImageError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        reason = " ".join(str(error).split())
        if isinstance(error, Image.DecompressionBombError):
            numbers = reason.partition(",")[0]
            raise BadImageError(
                f"the image {file_name} has too many pixels ({numbers}): cut it into parts or make "
                "it smaller; `retina predict --tile` reads up to a billion pixels"
            ) from error
        if isinstance(error, UnidentifiedImageError):  # its text shows Pillow's file object
            reason = "it is no image, or of an unknown format"
        raise BadImageError(
            f"cannot read the image {file_name} ({reason}): replace the file or leave it out"
        ) from error


def check_image_size(record: dict[str, Any], image: np.ndarray) -> None:
    """Detectron2's: the image has the size of its record, which gets it if it has none.

    Raises:
        BadImageError: it has another one; the line says if the camera's orientation is the reason.
    """
    try:
        detection_utils.check_image_size(record, image)
    except detection_utils.SizeMismatchError:
        height, width = image.shape[:2]
        expected = (record.get("width"), record.get("height"))
        reason = ""
        if expected == (height, width) and _is_turned(record["file_name"]):
            reason = " because its EXIF orientation turns it"
        raise BadImageError(
            f"the image {record['file_name']} has {width}x{height} pixels{reason}, but its record "
            f"has width {expected[0]} and height {expected[1]}: correct the record and its boxes"
        ) from None


def _is_turned(file_name: str) -> bool:
    try:
        with PathManager.open(file_name, "rb") as file, Image.open(file) as header:
            return header.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except Exception:  # Pillow raises many kinds of errors for a broken tag
        return False


def image_suffixes() -> set[str]:
    """Endings of the files that Pillow reads, in lower case with their dot."""
    return {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def check_format(image_format: str) -> None:
    """Check a value of ``INPUT.FORMAT``.

    Raises:
        ConfigError: Detectron2 cannot convert images to this format.
    """
    try:
        detection_utils.convert_PIL_to_numpy(Image.new("RGB", (1, 1)), image_format)
    except ValueError:  # Pillow's
        raise ConfigError(
            f"INPUT.FORMAT: unknown '{image_format}'; known: BGR (which Detectron2's weights "
            "need), RGB, YUV-BT.601 and Pillow's modes"
        ) from None


def _read_header(
    file: IO[bytes], file_name: str, image_format: str
) -> tuple[bytes | None, int | None]:
    """The bytes of a JPEG, and its orientation if OpenCV decodes it as Detectron2's reader does.

    Both are None for other files.
    """
    is_jpeg = file.read(2) == b"\xff\xd8"
    file.seek(0)
    data = file.read() if is_jpeg else None
    with Image.open(file if data is None else io.BytesIO(data)) as header:  # decodes no pixels
        # Modes I;16, I and F have more than 8 bits a pixel.
        if header.mode[0] in "IF" and image_format[:1] not in ("I", "F"):
            kind = "floating-point" if header.mode == "F" else "more than 8-bit"
            raise BadImageError(
                f"the image {file_name} has {kind} values (Pillow's mode {header.mode}), which "
                "would be read as white or black: convert it to 8 bit"
            )
        if header.format == "PNG":
            header.verify()  # the checksums, which Pillow does not compare when it decodes
        if data is None or header.format != "JPEG" or header.mode not in ("RGB", "L"):
            return data, None
        if image_format not in ("BGR", "RGB") or not data.endswith(b"\xff\xd9"):
            return data, None  # no end marker: truncated, or with trailing bytes
        try:
            return data, header.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # Pillow raises many kinds of errors for a broken tag
            return data, None


def _decode_jpeg(data: bytes, file_name: str, flags: int) -> np.ndarray | None:
    """OpenCV's decoded image; None if it cannot decode it."""
    image, damage = decode_jpeg(data, flags)
    if damage:
        raise BadImageError(
            f"the image {file_name} is damaged ({damage}): replace the file; if it looks right, "
            "save it again"
        )
    return image


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undo the camera's EXIF orientation (tag 274), 1 to 8. Other values count as 1: upright."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def image_to_tensor(image: np.ndarray) -> torch.Tensor:
    """Copy an (H, W, C) image, or a flipped view of one, to a contiguous (C, H, W) tensor.

    float64, which Detectron2 makes of YUV-BT.601, becomes float32: the precision of the weights.
    OpenCV splits uint8 images with three channels and flips the planes in place, in a tenth of the
    time of NumPy's copy.
    """
    if image.dtype != np.uint8 or image.shape[2:] != (3,):
        pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())
        return pixels.float() if pixels.dtype == torch.float64 else pixels
    reversed_axes = tuple(axis for axis, stride in enumerate(image.strides) if stride < 0)
    planes = np.empty((3, *image.shape[:2]), np.uint8)
    ordered = list(planes[::-1] if 2 in reversed_axes else planes)
    cv2.split(np.flip(image, reversed_axes), ordered)  # of the unflipped image, into the planes
    for plane in planes:
        for axis in {0, 1}.intersection(reversed_axes):
            cv2.flip(plane, axis, plane)
    return torch.from_numpy(planes)
