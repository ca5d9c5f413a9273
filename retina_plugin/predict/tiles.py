"""Overlapping tiles of an image too large for one pass, and one list of detections from them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from retina_plugin.errors import ConfigError

__all__ = ["Tile", "check_tiles", "merge_tiles", "tile_grid"]

# A box ends at a tile's border if it comes this close, as a part of the tile's side: boxes are that
# inexact.
_BORDER = 0.02
_AGREE = 0.5  # IoU in the common area of two tiles above which boxes are of one object


class Tile(NamedTuple):
    """A part of an image: XYXY in pixels, the upper bounds excluded."""

    x0: int
    y0: int
    x1: int
    y1: int


def check_tiles(tile: int, overlap: float) -> None:
    """Raise a :class:`ConfigError` for a side below 32 pixels or an overlap outside [0, .9]."""
    if tile < 32:
        raise ConfigError(f"tile {tile}: give the side of a tile in pixels, 32 or more")
    if not 0 <= overlap <= 0.9:
        raise ConfigError(f"overlap {overlap}: give a part of the tile's side from 0 to .9")


def tile_grid(height: int, width: int, tile: int, overlap: float) -> list[Tile]:
    """Tiles that cover an image, row by row.

    Neighbours share at least ``overlap`` of a tile's side. The last tile of a row or column ends
    with the image. All tiles have the same size: ``tile``, or the image's if that is smaller.
    """
    columns, rows = _starts(width, tile, overlap), _starts(height, tile, overlap)
    return [Tile(x, y, min(x + tile, width), min(y + tile, height)) for y in rows for x in columns]


def _starts(length: int, tile: int, overlap: float) -> list[int]:
    step = max(1, round(tile * (1 - overlap)))
    last = max(0, length - tile)
    return [*range(0, last, step), last]


def merge_tiles(
    tiles: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray,
    image_size: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One list of detections from those of overlapping tiles.

    Two boxes of different tiles are compared in the area that both tiles see: there they must be
    the same if they are of one object, however much of it each tile cuts off. With IoU above .5 in
    that area:

    - both whole, same class: the box with the higher score stays, as in NMS;
    - one of them ends at a border that cuts it: the whole one stays, whatever class the part was
      taken for;
    - both cut, same class: the box around both, with the higher score. So an object larger than
      the overlap, or than a tile, is put together.

    Args:
        tiles: (S, 4) the tile of each detection, XYXY.
        boxes: (S, 4) XYXY in pixels of the image.
        scores, classes: (S,).
        image_size: height and width.

    Returns:
        boxes, scores and classes by decreasing score.
    """
    cut = _is_cut(tiles, boxes, image_size)
    found: list[_Object] = []
    # owner[i]: the object that box i was found to be of
    owner = np.full(len(boxes), -1)
    for i in np.lexsort((-scores, cut)):  # whole boxes first, each by decreasing score
        seen = np.flatnonzero(owner >= 0)
        seen = seen[(tiles[seen] != tiles[i]).any(axis=1)]
        iou, share = _agreement(tiles[i], boxes[i], tiles[seen], boxes[seen])
        same_class = classes[seen] == classes[i]
        if cut[i]:
            # a part lies in the whole, which may be larger even where both tiles look
            matches = np.where(cut[seen], same_class & (iou > _AGREE), share > _AGREE)
        else:
            matches = same_class & (iou > _AGREE)
        if matches.any():
            best = np.where(matches, iou, -1).argmax()
            owner[i] = owner[seen[best]]
            if cut[i]:
                found[owner[i]].grow(boxes[i])
        else:
            owner[i] = len(found)
            found.append(_Object(boxes[i], scores[i], classes[i], bool(cut[i])))
    kept = _joined(found)
    order = np.argsort([-x.score for x in kept], kind="stable")
    return (
        np.array([kept[i].box for i in order], np.float32).reshape(-1, 4),
        np.array([kept[i].score for i in order], np.float32),
        np.array([kept[i].class_ for i in order], np.int64),
    )


class _Object:
    """A detection in the making."""

    def __init__(self, box: np.ndarray, score: float, class_: int, is_part: bool) -> None:
        self.box, self.score, self.class_, self.is_part = box.copy(), score, class_, is_part

    def grow(self, box: np.ndarray) -> None:
        """Cover another part. A whole box has its size."""
        if self.is_part:
            self.box[:2] = np.minimum(self.box[:2], box[:2])
            self.box[2:] = np.maximum(self.box[2:], box[2:])


def _joined(found: list[_Object]) -> list[_Object]:
    """Without parts that grew into another object of their class: one that four tiles cut."""
    kept: list[_Object] = []
    for x in sorted(found, key=lambda x: (x.is_part, -x.score)):
        if x.is_part and any(
            y.class_ == x.class_ and _inter(x.box, y.box) > 0.8 * min(_area(x.box), _area(y.box))
            for y in kept
            if y.is_part
        ):
            continue
        kept.append(x)
    return kept


def _is_cut(tiles: np.ndarray, boxes: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """(S,) whether a box ends at a border of its tile that is not the image's."""
    height, width = image_size
    margin = _BORDER * (tiles[:, 2:] - tiles[:, :2])
    inner_low = tiles[:, :2] > 0
    inner_high = tiles[:, 2:] < [width, height]
    low = (boxes[:, :2] < tiles[:, :2] + margin) & inner_low
    high = (boxes[:, 2:] > tiles[:, 2:] - margin) & inner_high
    return (low | high).any(axis=1)


def _agreement(
    tile: np.ndarray, box: np.ndarray, tiles: np.ndarray, boxes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How well a box agrees with boxes of other tiles, where both tiles look.

    Returns:
        IoU, and the share of ``box`` that lies in the other: (M,) each.
    """
    low, high = np.maximum(tile[:2], tiles[:, :2]), np.minimum(tile[2:], tiles[:, 2:])
    common = np.concatenate([low, high], axis=1)
    mine, theirs = _clip(np.broadcast_to(box, boxes.shape), common), _clip(boxes, common)
    inter = _inter(mine, theirs)
    union = _area(mine) + _area(theirs) - inter
    smallest = 1e-9
    return inter / np.maximum(union, smallest), inter / np.maximum(_area(mine), smallest)


def _clip(boxes: np.ndarray, limits: np.ndarray) -> np.ndarray:
    low = np.maximum(boxes[..., :2], limits[..., :2])
    high = np.minimum(boxes[..., 2:], limits[..., 2:])
    return np.concatenate([low, high], axis=-1)


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[..., 2:] - boxes[..., :2]).clip(min=0).prod(axis=-1)


def _inter(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _area(_clip(a, b))
