"""Reading, resizing and laying out images: Detectron2's pixels in a third of the time."""

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

# No call of OpenCV's here runs in threads: those hang in a loader's worker, which is a fork.


def read_image(file_name: str, image_format: str) -> np.ndarray:
    """Detectron2's ``read_image``, with OpenCV's decoder for JPEGs of three channels or one.

    Pillow reads the header, so that what the file is and how it is turned (EXIF, XMP) are what
    Detectron2 takes them to be; both decoders are libjpeg-turbo, so pixels are equal. Everything
    else is Detectron2's reader's: PNG (OpenCV gains little), CMYK, any other file, formats that
    aren't BGR or RGB, and JPEGs without an end marker, of which OpenCV 4 gives what there is.

    Returns:
        (H, W, C) image in ``image_format``, uint8 0 to 255 for all but YUV-BT.601.

    Raises:
        ConfigError: the file is missing or isn't an image.
    """
    try:
        with PathManager.open(file_name, "rb") as file:
            image = _decode_jpeg(file, image_format)
        if image is None:
            image = detection_utils.read_image(file_name, image_format)
        return image
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error...
        raise ConfigError(
            f"cannot read the image {file_name} ({error}): put the file in place, or take it out "
            "of the dataset's annotations"
        ) from error


def check_format(image_format: str) -> None:
    """``INPUT.FORMAT`` is one that images can be converted to.

    Raises:
        ConfigError: it is not.
    """
    try:
        detection_utils.convert_PIL_to_numpy(Image.new("RGB", (1, 1)), image_format)
    except ValueError:  # Pillow's
        raise ConfigError(
            f"INPUT.FORMAT: no '{image_format}'; set BGR (Detectron2's weights), RGB, YUV-BT.601 "
            "or a mode of Pillow"
        ) from None


def _decode_jpeg(file: IO[bytes], image_format: str) -> np.ndarray | None:
    """The upright image, or None where Detectron2's reader has to be asked."""
    # the first bytes alone, since that reader opens the file again
    if image_format not in ("BGR", "RGB") or file.read(2) != b"\xff\xd8":
        return None
    file.seek(0)
    data = file.read()
    if not data.endswith(b"\xff\xd9"):
        return None
    with Image.open(io.BytesIO(data)) as header:  # lazy: no pixels are decoded
        if header.format != "JPEG" or header.mode not in ("RGB", "L"):
            return None
        try:
            orientation = header.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # a broken tag may raise anything
            return None
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if image is None:
        return None
    image = _upright(image, orientation)
    return image[:, :, ::-1] if image_format == "RGB" else image


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undo the camera's EXIF orientation (tag 274): 1 to 8, anything else is as 1."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


class FastResize(T.ResizeTransform):
    """Detectron2's resize, with torch's bilinear resampling instead of Pillow's.

    Both are the triangle filter, widened by the scale where the image shrinks, horizontally and
    then vertically, each pass rounded to uint8. Torch keeps the weights in 16 bits and Pillow in
    22, so sums that lie on a half may round differently: by 1 level, over both passes by 2, in
    less than 0.1 % of pixels at usual sizes and in up to 3 % where the scale is a simple fraction.
    Whatever isn't bilinear on (H, W, 3) uint8 is Detectron2's.
    """

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        method = self.interp if interp is None else interp
        if method != Image.Resampling.BILINEAR or img.dtype != np.uint8 or img.shape[2:] != (3,):
            return super().apply_image(img, interp)
        assert img.shape[:2] == (self.h, self.w)
        if (self.h, self.w) == (self.new_h, self.new_w):
            return img
        # RGB may be a view of BGR: channels are turned back for the time being, not copied
        order = slice(None, None, -1 if img.strides[2] < 0 else 1)
        # the batch axis comes before the permute, or torch won't see that this is channels-last,
        # the layout it is fastest for by 2x
        pixels = torch.from_numpy(_plain(img[:, :, order]))[None].permute(0, 3, 1, 2)
        resized = F.interpolate(
            pixels, (self.new_h, self.new_w), mode="bilinear", antialias=True, align_corners=False
        )
        return resized[0].permute(1, 2, 0).numpy()[:, :, order]


def image_to_tensor(image: np.ndarray) -> torch.Tensor:
    """The (H, W, C) image as a contiguous (C, H, W) tensor that shares nothing with it.

    OpenCV splits the channels and turns flipped ones in place: a tenth of the time that NumPy's
    copy takes.
    """
    if image.dtype != np.uint8 or image.shape[2:] != (3,):
        return torch.from_numpy(image.transpose(2, 0, 1).copy())
    backwards = tuple(axis for axis, stride in enumerate(image.strides) if stride < 0)
    planes = np.empty((3, *image.shape[:2]), np.uint8)
    ordered = list(planes[::-1] if 2 in backwards else planes)
    cv2.split(np.flip(image, backwards), ordered)  # writes into them
    for plane in planes:
        for axis in {0, 1}.intersection(backwards):
            cv2.flip(plane, axis, plane)
    return torch.from_numpy(planes)


def _plain(image: np.ndarray) -> np.ndarray:
    """``image``, or a copy where torch can't share its memory: flipped or read-only."""
    return image if image.flags.writeable and min(image.strides) >= 0 else image.copy()
