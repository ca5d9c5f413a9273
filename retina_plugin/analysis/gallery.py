"""Pictures of single mistakes: a part of the image, and the boxes that go on top of it."""

from __future__ import annotations

import base64
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

from retina_plugin.data.images import BadImageError, check_image_size, read_image

from .cases import group_by_image
from .result import Analysis, Case, Shown

__all__ = ["Gallery", "Mark", "Picture"]

_WIDTH, _HEIGHT = 320, 240  # of a picture on the page, in CSS pixels
_SHARP = 1.5  # pixels of the JPEG for each of these at the most
_AROUND = 2.4  # side of the part of an image, in sides of the box
_LEAST = 0.3  # of the image's sides

# XYWH in pixels
_Box = tuple[float, ...] | np.ndarray


@dataclass(frozen=True)
class Mark:
    """A box on a picture, in its pixels.

    Args:
        kind: "truth" or "found".
        main: it is what the caption is about; the others are drawn thin and without a label.
        label: class, and score of a detection.
    """

    kind: str
    x: float
    y: float
    width: float
    height: float
    label: str
    main: bool


@dataclass(frozen=True)
class Picture:
    """A part of an image with its boxes.

    Args:
        width, height: in CSS pixels.
        source: a data URI; None: the image cannot be read.
        marks: its boxes, the main ones last.
        caption: what is wrong.
        file_name: of the image.
        classes: indices of the classes that it is about.
        first: it is shown whatever class is chosen.
    """

    width: int
    height: int
    source: str | None
    marks: list[Mark]
    caption: str
    file_name: str
    classes: list[int] = field(default_factory=list)
    first: bool = True


class Gallery:
    """Makes the pictures of an analysis. Images are read when they are needed.

    Attributes:
        unreadable: file -> why it could not be read; grey areas stand for such images.
    """

    def __init__(self, analysis: Analysis) -> None:
        self._truth = analysis.truth
        self._shown = analysis.shown
        self.unreadable: dict[str, str] = {}
        number = len(analysis.truth.image_ids)
        self._objects = group_by_image(analysis.truth.images, number)
        self._detections = group_by_image(analysis.shown.found.images, number)
        self._read = functools.lru_cache(maxsize=16)(self._read_image)

    def case(self, case: Case) -> Picture:
        """One mistake, with what is around it."""
        truth, found = self._truth, self._shown.found
        boxes = [box for box in (case.box, case.true_box) if box is not None]
        width, height = self._size(case.image)
        part = _part(boxes, width, height)
        marks = [
            _mark(part, truth.boxes[g], "truth")
            for g in self._objects(case.image)
            if tuple(truth.boxes[g].tolist()) != case.true_box
        ]
        marks += [
            _mark(part, found.boxes[i], "found")
            for i in self._detections(case.image)
            if tuple(found.boxes[i].tolist()) != case.box
        ]
        if case.true is not None and case.true_box is not None:
            marks.append(_mark(part, case.true_box, "truth", truth.class_names[case.true]))
        if case.found is not None and case.box is not None:
            label = f"{truth.class_names[case.found]} {case.score:.2f}"
            marks.append(_mark(part, case.box, "found", label))
        classes = {k for k in (case.found, case.true) if k is not None}
        return self._picture(case.image, part, marks, case.text, sorted(classes), case.first)

    def whole(self, image: int, shown: Shown, caption: str) -> Picture:
        """An image with what a model shows; its mistakes are the main boxes."""
        truth, found = self._truth, shown.found
        width, height = self._size(image)
        part = (0.0, 0.0, width, height)
        marks, classes = [], set()
        for g in self._objects(image).tolist():
            name = truth.class_names[truth.classes[g]] if shown.missed[g] else ""
            marks.append(_mark(part, truth.boxes[g], "truth", name))
            classes.add(int(truth.classes[g]))
        for i in np.flatnonzero(found.images == image).tolist():
            label = f"{truth.class_names[found.classes[i]]} {found.scores[i]:.2f}"
            marks.append(_mark(part, found.boxes[i], "found", "" if shown.right[i] else label))
            classes.add(int(found.classes[i]))
        return self._picture(image, part, marks, caption, sorted(classes), True)

    def _picture(
        self,
        image: int,
        part: tuple[float, float, float, float],
        marks: list[Mark],
        caption: str,
        classes: list[int],
        first: bool,
    ) -> Picture:
        pixels = self._read(image)
        width, height = _shown_size(part)
        source = None if pixels is None else _encode(pixels, part, width)
        inside = [m for m in marks if m.x < width and m.y < height and m.x + m.width > 0]
        inside = [m for m in inside if m.y + m.height > 0]
        name = self._truth.file_names[image]
        return Picture(
            width,
            height,
            source,
            sorted(inside, key=lambda mark: mark.main),
            caption,
            name,
            classes,
            first,
        )

    def _size(self, image: int) -> tuple[float, float]:
        """Width and height: the file's, else those of the pixels, else what the boxes need."""
        width, height = self._truth.sizes[image].tolist()
        if width > 0 and height > 0:
            return width, height
        pixels = self._read(image)
        if pixels is not None:
            return float(pixels.shape[1]), float(pixels.shape[0])
        boxes = [
            self._truth.boxes[self._objects(image)],
            self._shown.found.boxes[self._detections(image)],
        ]
        corners = np.concatenate([boxes[0], boxes[1], [[0, 0, 1, 1]]])
        width, height = (corners[:, :2] + corners[:, 2:]).max(axis=0).tolist()
        return width, height

    def _read_image(self, image: int) -> np.ndarray | None:
        path = self._truth.path(image)
        width, height = self._truth.sizes[image].tolist()
        try:
            pixels = read_image(path, "BGR")
            if width > 0 and height > 0:
                check_image_size({"file_name": path, "width": width, "height": height}, pixels)
        except BadImageError as error:
            self.unreadable[path] = str(error)
            return None
        return pixels


def _part(boxes: Sequence[_Box], width: float, height: float) -> tuple[float, float, float, float]:
    """XYWH of the part of an image that shows boxes and what is around them."""
    corners = np.array([[x, y, x + w, y + h] for x, y, w, h in boxes])
    x0, y0 = corners[:, :2].min(axis=0)
    x1, y1 = corners[:, 2:].max(axis=0)
    tall = max(_AROUND * (y1 - y0), _AROUND * (x1 - x0) * _HEIGHT / _WIDTH, _LEAST * height)
    wide = tall * _WIDTH / _HEIGHT
    wide, tall = min(wide, width), min(tall, height)
    x = min(max((x0 + x1 - wide) / 2, 0.0), width - wide)
    y = min(max((y0 + y1 - tall) / 2, 0.0), height - tall)
    return float(x), float(y), float(wide), float(tall)


def _shown_size(part: tuple[float, float, float, float]) -> tuple[int, int]:
    scale = min(_WIDTH / part[2], _HEIGHT / part[3])
    return max(1, round(scale * part[2])), max(1, round(scale * part[3]))


def _mark(part: tuple[float, float, float, float], box: _Box, kind: str, label: str = "") -> Mark:
    """Without a label it is not a main one."""
    scale = min(_WIDTH / part[2], _HEIGHT / part[3])
    x, y, width, height = (float(v) for v in box)
    left, top = (x - part[0]) * scale, (y - part[1]) * scale
    sides = round(left, 1), round(top, 1), round(width * scale, 1), round(height * scale, 1)
    return Mark(kind, *sides, label, bool(label))


def _encode(pixels: np.ndarray, part: tuple[float, float, float, float], shown_width: int) -> str:
    x, y, width, height = (round(v) for v in part)
    cut = pixels[y : y + max(height, 1), x : x + max(width, 1)]
    scale = _SHARP * shown_width / cut.shape[1]
    if scale < 1:
        size = [max(1, round(scale * side)) for side in (cut.shape[1], cut.shape[0])]
        cut = cv2.resize(cut, size, interpolation=cv2.INTER_AREA)
    data = cv2.imencode(".jpg", cut, [cv2.IMWRITE_JPEG_QUALITY, 80])[1]
    return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"
