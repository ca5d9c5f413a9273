"""Boxes, class names and scores on an image."""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Sequence
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

__all__ = ["class_colour", "draw_boxes"]

Colour = tuple[int, int, int]


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray,
    class_ids: np.ndarray,
    names: Sequence[str],
) -> np.ndarray:
    """A copy of an image with detections.

    Lines and letters grow with the image, so that they look the same at the size of a screen. The
    best detection is drawn last, on top. The font is DejaVu Sans, which matplotlib brings: Latin,
    Greek, Cyrillic, Arabic and more; OpenCV's own letters are ASCII. A name that it has no letters
    for, as in Chinese, is drawn as "#" and the class's number.

    Args:
        image: (H, W, 3) uint8 BGR.
        boxes: (S, 4) XYXY in pixels.
        scores, class_ids: (S,).
        names: of all classes.
    """
    drawn = np.ascontiguousarray(image).copy()
    height, width = drawn.shape[:2]
    side = max(height, width)
    line = max(1, round(side / 400))
    font = _font(max(10, round(side / 50)))
    order = np.argsort(scores, kind="stable")  # the best last
    for i in order:
        x0, y0, x1, y1 = _inside(boxes[i], width, height)
        colour = class_colour(int(class_ids[i]))
        cv2.rectangle(drawn, (x0, y0), (x1, y1), colour[::-1], line)
    for i in order:
        x0, y0, _, _ = _inside(boxes[i], width, height)
        label = f"{_shortened(_drawable(names[class_ids[i]], int(class_ids[i])))} {scores[i]:.2f}"
        _draw_label(drawn, (x0, y0), label, class_colour(int(class_ids[i])), font)
    return drawn


def class_colour(class_id: int) -> Colour:
    """RGB colour of a class. Neighbours are a golden ratio of the circle of hues apart."""
    hue = (0.08 + class_id * 0.618033988749895) % 1
    value = (1.0, 0.8)[class_id // 12 % 2]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _draw_label(
    image: np.ndarray,
    corner: tuple[int, int],
    label: str,
    colour: Colour,
    font: ImageFont.FreeTypeFont,
) -> None:
    """Draw it above the box's upper left corner; if that is outside the image, in the box."""
    height, width = image.shape[:2]
    pad = max(1, round(font.size / 8))
    ascent, descent = font.getmetrics()
    tall = min(ascent + descent, height)
    wide = min(round(font.getlength(label)) + 2 * pad, width)
    x = max(0, min(corner[0], width - wide))
    y = corner[1] - tall if corner[1] >= tall else min(corner[1], height - tall)
    plate = Image.new("RGB", (wide, tall), colour)
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    text = "black" if luminance > 128 else "white"
    ImageDraw.Draw(plate).text((pad, 0), label, fill=text, font=font)
    image[y : y + tall, x : x + wide] = np.asarray(plate)[:, :, ::-1]


def _inside(box: np.ndarray, width: int, height: int) -> tuple[int, int, int, int]:
    limits = [width - 1, height - 1] * 2
    x0, y0, x1, y1 = (int(min(max(round(v), 0), m)) for v, m in zip(box.tolist(), limits))
    return x0, y0, x1, y1


def _shortened(name: str) -> str:
    name = "".join(c if c.isprintable() else " " for c in name)
    return name if len(name) <= 40 else f"{name[:39]}…"


def _drawable(name: str, class_id: int) -> str:
    missing = any(c.isprintable() and ord(c) not in _letters() for c in name)
    return f"#{class_id}" if missing else name


@functools.lru_cache(maxsize=1)
def _letters() -> frozenset[int]:
    return frozenset(FT2Font(_font_file()).get_charmap())


def _font_file() -> str:
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@functools.lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_file(), size)
