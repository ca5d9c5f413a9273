"""Reading and resizing images, and making tensors of them, faster than Detectron2."""

from __future__ import annotations

import io
from typing import IO

import cv2
import numpy as np
import torch
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image
from torch.nn import functional as F

from retina_plugin.errors import ConfigError

__all__ = ["FastResize", "check_format", "image_to_tensor", "read_image"]

# Only OpenCV functions that start no threads are used here: a data loader's worker is a fork, in
# which OpenCV's threads hang.


def read_image(file_name: str, image_format: str) -> np.ndarray:
    """Detectron2's ``read_image``, with OpenCV as the decoder of colour and grey JPEGs.

    Pillow still reads the header, so that file type and orientation (EXIF, XMP) are the ones that
    Detectron2 sees. Both decoders are libjpeg-turbo, so pixels are equal. Detectron2's reader does
    the rest: PNG (OpenCV is hardly faster), CMYK and all other files, formats other than BGR and
    RGB, and truncated JPEGs, of which OpenCV 4 would return the part that it can decode.

    Args:
        file_name: a path, or a URL that Detectron2's ``PathManager`` can open.
        image_format: ``INPUT.FORMAT``.

    Returns:
        (H, W, C) image in ``image_format``: uint8 in [0, 255], float for YUV-BT.601.

    Raises:
        ConfigError: the file is missing or is not an image.
    """
    try:
        with PathManager.open(file_name, "rb") as file:
            image = _decode_jpeg(file, image_format)
        if image is None:
            image = detection_utils.read_image(file_name, image_format)
        return image
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise ConfigError(
            f"cannot read the image {file_name} ({error}): replace the file, or remove it from "
            "the dataset's annotations"
        ) from error


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


def _decode_jpeg(file: IO[bytes], image_format: str) -> np.ndarray | None:
    """The upright image; None if Detectron2's reader has to read the file."""
    # only two bytes at first: Detectron2's reader will open the file again
    if image_format not in ("BGR", "RGB") or file.read(2) != b"\xff\xd8":
        return None
    file.seek(0)
    data = file.read()
    if not data.endswith(b"\xff\xd9"):  # the end marker: truncated, or with trailing bytes
        return None
    with Image.open(io.BytesIO(data)) as header:  # does not decode pixels
        if header.format != "JPEG" or header.mode not in ("RGB", "L"):
            return None
        try:
            orientation = header.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # Pillow raises many kinds of errors for a broken tag
            return None
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if image is None:
        return None
    image = _upright(image, orientation)
    return image[:, :, ::-1] if image_format == "RGB" else image


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undo the camera's EXIF orientation (tag 274), 1 to 8. Other values count as 1: upright."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


class FastResize(T.ResizeTransform):
    """Detectron2's resize, with torch's bilinear resampling instead of Pillow's.

    Both apply a triangle filter, which is widened by the scale where the image shrinks. Both resize
    horizontally first, then vertically, and round to uint8 after each pass. torch stores the
    filter's weights in 16 bits and Pillow in 22, so sums near one half may round differently: by 1
    in a pass, so by at most 2. This happens in less than 0.1 % of pixels at usual sizes, and in up
    to 3 % where the scale is a simple fraction. Other interpolations, and images that are not
    (H, W, 3) uint8, are resized by Detectron2.
    """

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        method = self.interp if interp is None else interp
        if method != Image.Resampling.BILINEAR or img.dtype != np.uint8 or img.shape[2:] != (3,):
            return super().apply_image(img, interp)
        assert img.shape[:2] == (self.h, self.w)
        if (self.h, self.w) == (self.new_h, self.new_w):
            return img
        # an RGB image may be a reversed view of BGR: resize in BGR order, without a copy
        order = slice(None, None, -1 if img.strides[2] < 0 else 1)
        # add the batch dimension before permuting: only then torch recognises channels-last memory,
        # for which it is twice as fast
        pixels = torch.from_numpy(_shareable(img[:, :, order]))[None].permute(0, 3, 1, 2)
        resized = F.interpolate(
            pixels, (self.new_h, self.new_w), mode="bilinear", antialias=True, align_corners=False
        )
        return resized[0].permute(1, 2, 0).numpy()[:, :, order]


def image_to_tensor(image: np.ndarray) -> torch.Tensor:
    """Copy an (H, W, C) image, or a flipped view of one, to a contiguous (C, H, W) tensor.

    OpenCV splits uint8 images with three channels and flips the planes in place, in a tenth of the
    time of NumPy's copy.
    """
    if image.dtype != np.uint8 or image.shape[2:] != (3,):
        return torch.from_numpy(image.transpose(2, 0, 1).copy())
    reversed_axes = tuple(axis for axis, stride in enumerate(image.strides) if stride < 0)
    planes = np.empty((3, *image.shape[:2]), np.uint8)
    ordered = list(planes[::-1] if 2 in reversed_axes else planes)
    cv2.split(np.flip(image, reversed_axes), ordered)  # of the unflipped image, into the planes
    for plane in planes:
        for axis in {0, 1}.intersection(reversed_axes):
            cv2.flip(plane, axis, plane)
    return torch.from_numpy(planes)


def _shareable(image: np.ndarray) -> np.ndarray:
    """``image``, or a copy if torch cannot share its memory: if it is flipped or read-only."""
    return image if image.flags.writeable and min(image.strides) >= 0 else image.copy()
