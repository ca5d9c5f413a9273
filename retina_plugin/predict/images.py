"""Images in whatever form a caller has them."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from detectron2.data import detection_utils
from PIL import Image, ImageOps
from torch import Tensor

from retina_plugin.data.images import BadImageError, image_to_tensor, read_image
from retina_plugin.errors import ConfigError

__all__ = ["ImageLike", "as_bgr", "in_format", "large_images", "unresized"]

_LARGEST = 2**30  # pixels: OpenCV reads no more
_limits: list[int | None] = []  # Pillow's own, once for each open block of large_images
_lock = threading.Lock()

ImageLike = str | os.PathLike | np.ndarray | Image.Image


def as_bgr(image: Any) -> np.ndarray:
    """(H, W, 3) uint8 BGR pixels of an image in any of the forms that a predictor takes.

    Files are read as in training: upright by their EXIF orientation, grey as three equal channels,
    without transparency. PIL images are too, in any mode with 8 bits a channel; so ``Image.open``
    and the path give the same. Arrays are BGR, BGRA or grey; they may be views.

    Raises:
        BadImageError: the image is unreadable, empty, or has not 8 bits a channel.
        ConfigError: it is no image.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(os.fspath(image), "BGR")
    if isinstance(image, Image.Image):
        return _from_pil(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if image is None:
        raise ConfigError("got None for an image: cv2.imread gives it for a file it cannot read")
    raise ConfigError(
        f"cannot detect in an object of type {type(image).__name__}: give a path, a BGR array of "
        "uint8 or a PIL image"
    )


@contextlib.contextmanager
def large_images() -> Iterator[None]:
    """Read images of up to a billion pixels in this block. Blocks may be nested, or of threads.

    Pillow takes an image above 179 million pixels for an attack, and warns above half of that.
    """
    with _lock:
        _limits.append(_limits[0] if _limits else Image.MAX_IMAGE_PIXELS)
        if _limits[0] is not None:
            Image.MAX_IMAGE_PIXELS = max(_limits[0], _LARGEST)
    try:
        yield
    finally:
        with _lock:
            limit = _limits.pop()
            if not _limits:
                Image.MAX_IMAGE_PIXELS = limit


def _from_pil(image: Image.Image) -> np.ndarray:
    # As read_image, for which 16 bits would become white.
    if image.mode[0] in "IF":
        raise BadImageError(
            f"the PIL image has more than 8 bits a channel (mode {image.mode}): convert it to 8 bit"
        )
    if 0 in image.size:
        raise BadImageError(f"the PIL image is empty: its size is {image.size}")
    try:
        upright = ImageOps.exif_transpose(image)
        return detection_utils.convert_PIL_to_numpy(upright, "BGR")
    except Exception as error:  # a lazily opened file that is damaged: many kinds of errors
        reason = " ".join(str(error).split())
        raise BadImageError(f"cannot read the PIL image ({reason}): open it again") from None


def _from_array(image: np.ndarray) -> np.ndarray:
    shape = " x ".join(map(str, image.shape)) or "no dimensions"
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4):
        transposed = image.ndim == 3 and image.shape[0] in (1, 3, 4)
        hint = ": image.transpose(1, 2, 0) has the channels last" if transposed else ""
        raise BadImageError(
            f"an image must be height x width x 3 (BGR), x 4 (BGRA) or grey, got {shape}{hint}"
        )
    if image.size == 0:
        raise BadImageError(f"the image is empty: its shape is {shape}")
    if image.dtype != np.uint8:
        raise BadImageError(
            f"an image must be uint8 in [0, 255], got {image.dtype}: scale it and use "
            "image.astype('uint8')"
        )
    if image.shape[2] == 1:
        return np.repeat(image, 3, axis=2)
    return image[:, :, :3]


def in_format(image: np.ndarray, image_format: str) -> np.ndarray:
    """A BGR image in ``INPUT.FORMAT``; for BGR and RGB a view of it."""
    if image_format == "BGR":
        return image
    if image_format == "RGB":
        return image[:, :, ::-1]
    rgb = Image.fromarray(np.ascontiguousarray(image[:, :, ::-1]))
    return detection_utils.convert_PIL_to_numpy(rgb, image_format)


def unresized(resizes: Sequence[Callable[[np.ndarray], Tensor]]) -> Callable[[np.ndarray], Tensor]:
    """What prepares an image for test-time augmentation, which resizes it for each view."""

    def prepare(image: np.ndarray) -> Tensor:
        if max(image.shape[:2]) > 10 * min(image.shape[:2]):  # a thin one may lose its short side
            for view in (resize(image) for resize in resizes):
                if 0 in view.shape:
                    return view
        return image_to_tensor(image)

    return prepare
