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

    A box is cut if it ends at a border of its tile inside the image. Two boxes of different tiles
    are of one object if their IoU is above .5 in the area that both tiles see: there they must be
    the same, however much of the object each tile cuts off.

    - Of whole boxes of one object and class the one with the higher score stays, as in NMS.
    - A cut box goes if another tile sees its place uncut: what is there is told by that tile. It
      also goes if half of it lies in a whole box of another tile, whatever class the part was
      taken for.
    - Other cut boxes of one object become the box around them, whatever their classes. Each class
      keeps its best score. So an object larger than the overlap, or than a tile, is put together.

    Args:
        tiles: (S, 4) the tile of each detection, XYXY.
        boxes: (S, 4) XYXY in pixels of the image.
        scores, classes: (S,).
        image_size: height and width.

    Returns:
        boxes, scores and classes by decreasing score.
    """
    index = np.unique(tiles, axis=0, return_inverse=True)[1].reshape(-1)
    cut = _is_cut(tiles, boxes, image_size)
    considered = ~cut | ~_seen_uncut(tiles, boxes, image_size)
    i, j = _overlapping(tiles, boxes, index, np.flatnonzero(considered))
    iou, share = _agreement(tiles[i], boxes[i], tiles[j], boxes[j])
    agree, of_others = iou > _AGREE, index[i] != index[j]
    order = np.argsort(-scores, kind="stable")
    rivals = agree & of_others & ~cut[i] & ~cut[j] & (classes[i] == classes[j])
    whole = _best(order[~cut[order]], i[rivals], j[rivals])
    is_told = np.zeros(len(boxes), bool)
    is_told[i[of_others & (share > _AGREE) & np.isin(j, whole)]] = True
    parts = order[(cut & considered & ~is_told)[order]]
    found = [(boxes[k], scores[k], classes[k]) for k in whole]
    for same in _groups(parts, i[agree], j[agree]):
        found += _put_together(index[same], boxes[same], scores[same], classes[same])
    found.sort(key=lambda x: -x[1])
    merged_boxes, merged_scores, merged_classes = zip(*found) if found else ((), (), ())
    return (
        np.array(merged_boxes, np.float32).reshape(-1, 4),
        np.array(merged_scores, np.float32),
        np.array(merged_classes, np.int64),
    )


def _overlapping(
    tiles: np.ndarray, boxes: np.ndarray, index: np.ndarray, considered: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (i, j), (j, i) and (i, i) of boxes that overlap, of tiles that do.

    Others cannot agree. They are the most by far, so tiles are compared before boxes.

    Args:
        index: (S,) a number for each tile.
        considered: indices of the boxes to compare.
    """
    by_tile = considered[np.argsort(index[considered], kind="stable")]
    groups = np.split(by_tile, np.flatnonzero(np.diff(index[by_tile])) + 1)
    pairs = [np.zeros((2, 0), int)]
    if len(by_tile):
        first = tiles[[group[0] for group in groups]]
        for group, near in zip(groups, _overlap(first, first)):
            others = np.concatenate([groups[t] for t in np.flatnonzero(near)])
            a, b = np.nonzero(_overlap(boxes[group], boxes[others]))
            pairs.append(np.stack([group[a], others[b]]))
    i, j = np.concatenate(pairs, axis=1)
    return i, j


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(M, 4), (N, 4) -> (M, N) whether boxes overlap."""
    return np.all((a[:, None, :2] < b[:, 2:]) & (a[:, None, 2:] > b[:, :2]), axis=2)


def _best(order: np.ndarray, i: np.ndarray, j: np.ndarray) -> list[int]:
    """Boxes in this order, without those that are rivals of one that stays: pairs (i, j)."""
    rivals: dict[int, list[int]] = {}
    for a, b in zip(i.tolist(), j.tolist()):
        rivals.setdefault(a, []).append(b)
    gone: set[int] = set()
    best = []
    for k in order.tolist():
        if k not in gone:
            best.append(k)
            gone.update(rivals.get(k, ()))
    return best


def _groups(parts: np.ndarray, i: np.ndarray, j: np.ndarray) -> list[np.ndarray]:
    """The parts of each object, in order: chains of parts that agree, by pairs (i, j)."""
    place = np.full(max(parts.max(initial=-1), i.max(initial=-1)) + 1, -1)
    place[parts] = label = np.arange(len(parts))
    a, b = place[i], place[j]
    both = (a >= 0) & (b >= 0)
    a, b = a[both], b[both]
    while (label[a] != label[b]).any():
        label = label.copy()
        np.minimum.at(label, a, label[b])
        label = label[label]  # chains get shorter by half
    by_label = np.argsort(label, kind="stable")
    return np.split(parts[by_label], np.flatnonzero(np.diff(label[by_label])) + 1)


def _put_together(
    index: np.ndarray, boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray
) -> list[tuple[np.ndarray, np.floating, np.integer]]:
    """Box, score and class of an object for each class that its parts were taken for.

    The box covers one part of each tile: of this class, or else the best of the tile.

    Args:
        index: (S,) a number for each tile.
        boxes, scores, classes: of the parts, by decreasing score.
    """
    found = []
    for k in dict.fromkeys(classes.tolist()):
        of_class = np.argsort(classes != k, kind="stable")  # this class first
        _, first = np.unique(index[of_class], return_index=True)
        cover = boxes[of_class[first]]
        box = np.concatenate([cover[:, :2].min(axis=0), cover[:, 2:].max(axis=0)])
        found.append((box, scores[of_class[0]], classes[of_class[0]]))
    return found


def _is_cut(tiles: np.ndarray, boxes: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """(S,) whether a box ends at or beyond a border of the tile that is not the image's.

    Args:
        tiles: (S, 4), or (4,) for one that all boxes are compared with.
    """
    height, width = image_size
    margin = _BORDER * (tiles[..., 2:] - tiles[..., :2])
    inner_low = tiles[..., :2] > 0
    inner_high = tiles[..., 2:] < [width, height]
    low = (boxes[:, :2] < tiles[..., :2] + margin) & inner_low
    high = (boxes[:, 2:] > tiles[..., 2:] - margin) & inner_high
    return (low | high).any(axis=1)


def _seen_uncut(tiles: np.ndarray, boxes: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """(S,) whether the place of a box lies in another tile whose borders do not cut it."""
    seen = np.zeros(len(boxes), bool)
    for tile in np.unique(tiles, axis=0):
        seen |= ~_is_cut(tile, boxes, image_size) & (tiles != tile).any(axis=1)
    return seen


def _agreement(
    tiles: np.ndarray, boxes: np.ndarray, other_tiles: np.ndarray, others: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How well boxes agree with others, pair by pair, where both tiles look.

    Returns:
        IoU, and the share of the box that lies in the other: (M,) each.
    """
    low = np.maximum(tiles[:, :2], other_tiles[:, :2])
    high = np.minimum(tiles[:, 2:], other_tiles[:, 2:])
    common = np.concatenate([low, high], axis=1)
    mine, theirs = _clip(boxes, common), _clip(others, common)
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
