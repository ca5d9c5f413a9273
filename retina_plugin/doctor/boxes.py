"""Ground-truth boxes that cannot be meant: not numbers, outside the image, in another format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .findings import Finding, Severity
from .tally import Kind, Tally

__all__ = ["BoxTable", "as_boxes", "check_boxes"]

_ERROR, _WARNING, _NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE

_NOT_FOUR = Kind(_ERROR, "boxes that are not four numbers", "correct or remove them")
_NAN = Kind(_ERROR, "boxes with NaN", "correct or remove them")
_INFINITE = Kind(_ERROR, "boxes with an infinite number", "correct or remove them")
_NEGATIVE = Kind(
    _ERROR,
    "boxes with a negative width or height",
    "give the corner with the smaller x and y, and positive sizes",
)
_HUGE = Kind(
    _ERROR, "boxes more than a hundred times as large as their image", "correct or remove them"
)
_RELATIVE = Kind(
    _ERROR,
    "all boxes lie between 0 and 1, as shares of the image",
    "multiply them by the image's width and height: boxes are in pixels",
)
_CORNERS = Kind(
    _ERROR,
    "boxes that leave their image as [x, y, width, height] but fit as [x1, y1, x2, y2]",
    "write them as [x, y, width, height]",
)
_OUTSIDE = Kind(_WARNING, "boxes outside their image, which no detection can match")
_LEAVING = Kind(
    _WARNING,
    "boxes that leave their image by more than a pixel",
    "check that they are [x, y, width, height] in pixels of the image as it is stored",
)
_NO_AREA = Kind(_WARNING, "boxes without area, which training leaves out and evaluation misses")
_TINY = Kind(_WARNING, "boxes thinner than a pixel")
_DUPLICATE = Kind(
    _WARNING, "boxes that repeat another one of the same image and class", "remove them"
)
_NEAR_DUPLICATE = Kind(_NOTE, "boxes with IoU above .95 with another one of their class")
_LONG = Kind(_NOTE, "boxes more than 20 times as long as they are wide, or as wide as long")


@dataclass(frozen=True)
class BoxTable:
    """The boxes of a dataset, N of them.

    Args:
        boxes: (N, 4) XYWH in pixels; NaN where ``unreadable``.
        unreadable: (N,) bool, of boxes that are not four numbers.
        sizes: (N, 2) width and height of the box's image, NaN if unknown.
        image: (N,) index of the image.
        category: (N,) a number that stands for the class.
        describe: names a box, e.g. "annotation 7 of a.jpg".
    """

    boxes: np.ndarray
    unreadable: np.ndarray
    sizes: np.ndarray
    image: np.ndarray
    category: np.ndarray
    describe: Callable[[int], str]


def as_boxes(raw: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """What stands for boxes as an array (N, 4), and which of them (N,) are not four numbers.

    The rows of those are NaN.
    """
    try:
        array = np.array(raw)
        if array.ndim == 2 and array.shape[1] == 4 and array.dtype.kind in "iuf":
            return array.astype(np.float64), np.zeros(len(array), bool)
    except ValueError:  # of several lengths
        pass
    boxes = np.full((len(raw), 4), np.nan)
    unreadable = np.ones(len(raw), bool)
    for i, box in enumerate(raw):
        if isinstance(box, np.ndarray):
            box = box.tolist()
        if isinstance(box, (list, tuple)) and len(box) == 4 and all(map(_is_real, box)):
            boxes[i] = [min(max(n, -1.7e308), 1.7e308) if isinstance(n, int) else n for n in box]
            unreadable[i] = False
    return boxes, unreadable


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def check_boxes(table: BoxTable, where: str) -> Iterator[Finding]:
    """What is wrong with boxes: counted by kind, with the first one named.

    Errors are what would make training or its numbers wrong; warnings may be meant.
    """
    tally = Tally(where)
    boxes, readable = table.boxes, ~table.unreadable

    def name(i: int) -> str:
        numbers = ", ".join(f"{x:g}" for x in boxes[i])
        return f"{table.describe(i)}, [{numbers}]"

    tally.add_where(_NOT_FOUR, table.unreadable, table.describe)
    nan = readable & np.isnan(boxes).any(axis=1)
    tally.add_where(_NAN, nan, name)
    # float32, because that is what training computes with
    with np.errstate(over="ignore"):
        infinite = readable & np.isinf(boxes.astype(np.float32)).any(axis=1)
    tally.add_where(_INFINITE, infinite, name)
    good = readable & ~nan & ~infinite
    safe = np.where(good[:, None], boxes, 0.0)  # comparisons below need numbers
    x, y, w, h = safe.T
    width, height = np.nan_to_num(table.sizes, nan=1e5).T  # larger than any image
    negative = good & ((w < 0) | (h < 0))
    tally.add_where(_NEGATIVE, negative, name)
    good &= ~negative
    sides = np.stack([width, height, width, height], axis=1)
    huge = good & (np.abs(safe) > 100 * sides).any(axis=1)
    tally.add_where(_HUGE, huge, name)
    good &= ~huge

    relative = good & (safe <= 1).all(axis=1) & (safe >= 0).all(axis=1) & (width > 2) & (height > 2)
    relative &= (w > 0) & (h > 0) & ((safe != np.round(safe)).any(axis=1))
    if relative.any() and relative.sum() == good.sum():
        tally.add_where(_RELATIVE, relative, name)
        yield from tally.findings(len(boxes))
        return  # everything below follows from it
    leaving = good & ((x < -1) | (y < -1) | (x + w > width + 1) | (y + h > height + 1))
    corners = (x >= 0) & (y >= 0) & (w > x) & (h > y) & (w <= width + 1) & (h <= height + 1)
    corners &= leaving
    # Of boxes in the wrong format about three in four leave the image: those with their centre in
    # the right or the lower half. A right box that leaves the image hardly fits as corners.
    if corners.sum() >= max(4, 0.2 * good.sum()):
        tally.add_where(_CORNERS, corners, name)
        yield from tally.findings(len(boxes))
        return
    no_area = good & ((w == 0) | (h == 0))
    tally.add_where(_NO_AREA, no_area, name)
    outside = good & ((x >= width) | (y >= height) | (x + w <= 0) | (y + h <= 0)) & ~no_area
    tally.add_where(_OUTSIDE, outside, name)
    tally.add_where(_LEAVING, leaving & ~outside & ~no_area, name)
    with_area = good & ~no_area
    tally.add_where(_TINY, with_area & ((w < 1) | (h < 1)), name)
    with np.errstate(divide="ignore", invalid="ignore"):
        long = with_area & (np.maximum(w / h, h / w) > 20)
    tally.add_where(_LONG, long, name)
    exact, near = _duplicates(table, with_area)
    tally.add_where(_DUPLICATE, exact, name)
    tally.add_where(_NEAR_DUPLICATE, near, name)
    yield from tally.findings(len(boxes))


def _duplicates(table: BoxTable, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) boxes that equal an earlier one of their image and class, and those that nearly do."""
    index = np.flatnonzero(chosen)
    boxes = table.boxes[index]
    image, category = table.image[index], table.category[index]
    # Neighbours of the same image and class, by x. Near duplicates differ in x by a twentieth.
    order = np.lexsort((*boxes.T[::-1], category, image))
    boxes, image, category = boxes[order], image[order], category[order]
    exact, near = np.zeros(len(order), bool), np.zeros(len(order), bool)
    first = np.arange(len(order))
    for step in range(1, 50):  # a box with more near neighbours has been found by the first ones
        first = first[first + step < len(order)]
        second = first + step
        close = (image[first] == image[second]) & (category[first] == category[second])
        close &= boxes[second, 0] - boxes[first, 0] <= 0.06 * boxes[first, 2]
        first = first[close]
        if not len(first):
            break
        second = first + step
        equal = (boxes[first] == boxes[second]).all(axis=1)
        exact[second[equal]] = True
        near[second[~equal & (_iou(boxes[first], boxes[second]) > 0.95)]] = True
    result = np.zeros((2, len(table.boxes)), bool)
    result[0, index[order]] = exact
    result[1, index[order]] = near & ~exact
    return result[0], result[1]


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of (M, 4) XYWH boxes, row by row."""
    sides = np.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    inter = sides.clip(min=0).prod(axis=1)
    return inter / (a[:, 2:].prod(axis=1) + b[:, 2:].prod(axis=1) - inter)
