"""Resizing images: Detectron2's way, faster, and torchvision's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.data import transforms as T
from PIL import Image
from torch.nn import functional as F

from retina_plugin.config import KEYS
from retina_plugin.errors import check_choice

__all__ = ["FastResize", "TorchvisionResize", "TorchvisionResizeShortestEdge", "choose_resize"]


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


class TorchvisionResize(T.ResizeTransform):
    """The resize of torchvision's detectors: bilinear, without antialiasing or rounding.

    The (H, W, C) image becomes float32, with the range that it had. (torchvision scales it to
    [0, 1] and normalises it before it resizes it, which gives the same numbers but for their
    rounding.) Other interpolations, as for a segmentation map, are Detectron2's.
    """

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        method = self.interp if interp is None else interp
        if method != Image.Resampling.BILINEAR or img.ndim != 3:
            return super().apply_image(img, interp)
        assert img.shape[:2] == (self.h, self.w)
        pixels = torch.from_numpy(np.ascontiguousarray(img.transpose(2, 0, 1), dtype=np.float32))
        resized = F.interpolate(
            pixels[None], (self.new_h, self.new_w), mode="bilinear", align_corners=False
        )
        return resized[0].permute(1, 2, 0).numpy()


class TorchvisionResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's augmentation with the sizes of torchvision's ``GeneralizedRCNNTransform``.

    Both sides times min(short / shorter side, ``max_size`` / longer side), rounded down. The short
    edge is drawn as Detectron2 draws it.
    """

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        if self.is_range:
            low, high = self.short_edge_length
            short = int(np.random.randint(low, high + 1))
        else:
            short = int(np.random.choice(self.short_edge_length))
        if short == 0:
            return T.NoOpTransform()
        # in float64, as Python's numbers there: 319.99999 becomes 319, too
        scale = min(short / min(height, width), self.max_size / max(height, width))
        new_height, new_width = (max(1, math.floor(side * scale)) for side in (height, width))
        return TorchvisionResize(height, width, new_height, new_width, self.interp)


def choose_resize(augmentations: Sequence[T.Augmentation], name: str) -> list[T.Augmentation]:
    """Augmentations whose resize is that of ``INPUT.RESIZE``.

    Args:
        augmentations: Detectron2's for a config.
        name: "detectron2" or "torchvision".

    Raises:
        ConfigError: an unknown name.
    """
    check_choice("INPUT.RESIZE", name, KEYS["INPUT.RESIZE"].choices)
    if name == "detectron2":
        return list(augmentations)
    return [
        TorchvisionResizeShortestEdge(
            list(a.short_edge_length), a.max_size, "range" if a.is_range else "choice", a.interp
        )
        if type(a) is T.ResizeShortestEdge
        else a
        for a in augmentations
    ]


def _shareable(image: np.ndarray) -> np.ndarray:
    """``image``, or a copy if torch cannot share its memory: if it is flipped or read-only."""
    return image if image.flags.writeable and min(image.strides) >= 0 else image.copy()
