"""Tiles: the grid covers the image, and objects that borders cut are found once and whole."""

import sys

import numpy as np
import pytest

from retina_plugin.predict.tiles import merge_tiles, tile_grid


@pytest.mark.parametrize("size", [(100, 100), (1, 1000), (1000, 640), (799, 801), (64, 65)])
@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.9])
def test_grid_covers_the_image(size, overlap):
    height, width = size
    seen = np.zeros(size, bool)
    for tile in tile_grid(height, width, 64, overlap):
        assert 0 <= tile.x0 < tile.x1 <= width and 0 <= tile.y0 < tile.y1 <= height
        assert (tile.x1 - tile.x0, tile.y1 - tile.y0) == (min(64, width), min(64, height))
        seen[tile.y0 : tile.y1, tile.x0 : tile.x1] = True
    assert seen.all()


def test_small_object_is_whole_in_a_tile():
    """Anywhere, if it is not larger than the overlap."""
    tiles = np.array(tile_grid(500, 700, 100, 0.3))
    for x, y in np.random.default_rng(0).uniform(0, [670, 470], (200, 2)):
        inside = (tiles[:, :2] <= [x, y]) & (tiles[:, 2:] >= [x + 30, y + 30])
        assert inside.all(axis=1).any()


def detect(objects, classes, size, side, overlap, rng):
    """What a detector sees: each object's part in each tile, a pixel off, if 15 % are visible."""
    rows = []
    for tile in np.array(tile_grid(*size, side, overlap), np.float32):
        for box, k in zip(objects, classes):
            part = np.concatenate([np.maximum(box[:2], tile[:2]), np.minimum(box[2:], tile[2:])])
            if (part[2:] - part[:2] < 4).any():
                continue
            share = (part[2:] - part[:2]).prod() / (box[2:] - box[:2]).prod()
            if share < 0.15:
                continue
            # a part is often taken for another class
            seen = k if share > 0.6 else (k + 1) % 10
            rows.append([*tile, *(part + rng.uniform(-1, 1, 4)), 0.5 + 0.4 * share, seen])
    rows = np.array(rows, np.float32)
    return merge_tiles(rows[:, :4], rows[:, 4:8], rows[:, 8], rows[:, 9].astype(int), size)


def test_each_object_is_found_once_and_whole():
    """Objects up to the overlap's size all over an image, which every border cuts."""
    rng = np.random.default_rng(0)
    corners = np.stack(np.meshgrid(np.arange(5, 760, 45), np.arange(5, 560, 45)), -1).reshape(-1, 2)
    sizes = rng.uniform(18, 36, corners.shape)
    objects = np.concatenate([corners, corners + sizes], axis=1).astype(np.float32)
    classes = rng.integers(0, 10, len(objects))
    boxes, scores, found = detect(objects, classes, (600, 800), 200, 0.2, rng)
    assert len(boxes) == len(objects) and (np.diff(scores) <= 0).all()
    near = np.abs(boxes[:, None] - objects).max(axis=2)
    assert (near.min(axis=1) < 1.01).all() and len(set(near.argmin(axis=1))) == len(objects)
    np.testing.assert_array_equal(found, classes[near.argmin(axis=1)])


def test_object_larger_than_a_tile_is_put_together():
    """Parts of one class: one box around all of them."""
    tiles = np.array(tile_grid(100, 260, 100, 0.2), np.float32)
    box = np.array([20, 30, 250, 70], np.float32)
    low, high = np.maximum(tiles[:, :2], box[:2]), np.minimum(tiles[:, 2:], box[2:])
    parts = np.concatenate([low, high], axis=1)
    scores = np.linspace(0.5, 0.9, len(parts), dtype=np.float32)
    boxes, merged, _ = merge_tiles(tiles, parts, scores, np.zeros(len(parts), int), (100, 260))
    np.testing.assert_array_equal(boxes, [box])
    assert merged[0] == scores.max()


def test_parts_of_different_classes_become_whole_boxes():
    """An object larger than the overlap, halved by a border: no half stays, both classes do."""
    tiles = np.array([[0, 0, 100, 100], [80, 0, 180, 100]], np.float32)
    parts = np.array([[60, 20, 100, 60], [80, 20, 130, 60]], np.float32)
    scores, classes = np.array([0.9, 0.5], np.float32), np.array([3, 8])
    boxes, merged, found = merge_tiles(tiles, parts, scores, classes, (100, 180))
    np.testing.assert_array_equal(boxes, [[60, 20, 130, 60]] * 2)
    assert merged.tolist() == scores.tolist() and found.tolist() == [3, 8]


def test_part_that_another_tile_does_not_confirm_goes():
    """That tile sees the place with what is around it."""
    tiles = np.array([[0, 0, 100, 100]], np.float32)
    for x, kept in ((60, 1), (88, 0)):  # cut off by the other tile, or inside it
        boxes = np.array([[x, 20, 100, 40]], np.float32)
        other = np.array([[80, 0, 180, 100]], np.float32)
        merged, _, _ = merge_tiles(
            np.concatenate([tiles, other]),
            np.concatenate([boxes, [[140, 60, 150, 80]]]),
            np.array([0.9, 0.8], np.float32),
            np.array([0, 0]),
            (100, 180),
        )
        assert len(merged) == 1 + kept


def test_different_objects_stay():
    """Neighbours, another class at the same place, and objects of one tile are not joined."""
    tiles = np.array([[0, 0, 100, 100], [80, 0, 180, 100], [80, 0, 180, 100]], np.float32)
    boxes = np.array([[60, 20, 88, 40], [91, 20, 130, 40], [91, 22, 130, 42]], np.float32)
    scores = np.array([0.9, 0.8, 0.7], np.float32)
    merged, _, _ = merge_tiles(tiles, boxes, scores, np.array([0, 0, 1]), (100, 180))
    np.testing.assert_array_equal(merged, boxes)
    assert len(merge_tiles(tiles[:0], boxes[:0], scores[:0], np.zeros(0, int), (9, 9))[0]) == 0


def in_common(tile, box, other_tile, other):
    """IoU of two boxes, and the share of the first in the second, where both tiles look."""
    low, high = np.maximum(tile[:2], other_tile[:2]), np.minimum(tile[2:], other_tile[2:])

    def area(low, high):
        return (high - low).clip(min=0).prod()

    (a, b), (c, d) = ((np.maximum(x[:2], low), np.minimum(x[2:], high)) for x in (box, other))
    inter = area(np.maximum(a, c), np.minimum(b, d))
    union = area(a, b) + area(c, d) - inter
    return inter / max(union, np.float32(1e-9)), inter / max(area(a, b), np.float32(1e-9))


def merged_one_by_one(tiles, boxes, scores, classes, size):
    """The docstring of ``merge_tiles``, box by box."""
    image = np.array([size[1], size[0]])

    def is_cut(tile, box):
        margin = np.float32(0.02) * (tile[2:] - tile[:2])
        low = (box[:2] < tile[:2] + margin) & (tile[:2] > 0)
        high = (box[2:] > tile[2:] - margin) & (tile[2:] < image)
        return (low | high).any()

    whole, parts, groups = [], [], []
    order = np.argsort(-scores, kind="stable")
    agreement = {
        (i, j): in_common(tiles[i], boxes[i], tiles[j], boxes[j]) for i in order for j in order
    }
    other = {(i, j): (tiles[i] != tiles[j]).any() for i in order for j in order}
    for i in order:
        same = [j for j in whole if classes[j] == classes[i] and other[i, j]]
        if not is_cut(tiles[i], boxes[i]) and not any(agreement[i, j][0] > 0.5 for j in same):
            whole.append(i)
    for i in order:
        if not is_cut(tiles[i], boxes[i]):
            continue
        uncut = any(other[i, j] and not is_cut(tiles[j], boxes[i]) for j in order)
        if uncut or any(other[i, j] and agreement[i, j][1] > 0.5 for j in whole):
            continue
        parts.append(i)
        joined = [g for g in groups if any(agreement[i, j][0] > 0.5 for j in g)]
        groups = [g for g in groups if g not in joined] + [[j for g in joined for j in g] + [i]]
    found = [(*boxes[i], scores[i], classes[i]) for i in whole]
    for group in groups:
        group = sorted(group, key=parts.index)
        for k in dict.fromkeys(classes[group]):
            best_of_tile = {}
            for i in sorted(group, key=lambda i: classes[i] != k):
                best_of_tile.setdefault(tuple(tiles[i]), boxes[i])
            cover = np.array(list(best_of_tile.values()))
            score = max(scores[i] for i in group if classes[i] == k)
            found.append((*cover[:, :2].min(axis=0), *cover[:, 2:].max(axis=0), score, k))
    return sorted(found)


@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.7])
@pytest.mark.parametrize("number_of_classes", [1, 3])
def test_equals_merging_one_by_one(overlap, number_of_classes):
    """Random objects, seen by random tiles, some of them cut; many agree."""
    rng = np.random.default_rng(0)
    size, joined = (230, 310), 0
    grid = np.array(tile_grid(*size, 100, overlap), np.float32)
    for _ in range(12):
        corners = rng.uniform(0, 0.8, (7, 2)) * size[::-1]
        objects = np.concatenate([corners, corners + rng.uniform(5, 120, (7, 2))], axis=1)
        tiles = grid[rng.integers(0, len(grid), 40)]
        boxes = objects[rng.integers(0, 7, 40)] + rng.uniform(-2, 2, (40, 4))
        boxes[:, :2] = np.maximum(boxes[:, :2], tiles[:, :2])
        boxes[:, 2:] = np.minimum(boxes[:, 2:], tiles[:, 2:])
        keep = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        tiles, boxes = tiles[keep], boxes[keep].astype(np.float32)
        scores = rng.permutation(len(boxes)).astype(np.float32)
        classes = rng.integers(0, number_of_classes, len(boxes))
        merged, best, found = merge_tiles(tiles, boxes, scores, classes, size)
        rows = sorted((*box, s, k) for box, s, k in zip(merged, best, found))
        np.testing.assert_array_equal(rows, merged_one_by_one(tiles, boxes, scores, classes, size))
        joined += len(boxes) - len(rows)
    assert joined > 0


def test_steps_grow_with_the_number_of_detections():
    """Counted in calls: with their square, 10,000 detections never ended."""
    steps = [0]

    def count(frame, event, function):
        steps[0] += event in ("call", "c_call")

    def steps_of(side):
        rng = np.random.default_rng(0)
        tiles = np.repeat(np.array(tile_grid(side, side, 100, 0.2), np.float32), 20, axis=0)
        corners = rng.uniform(10, 80, (len(tiles), 2)).astype(np.float32)
        boxes = np.concatenate([corners, corners + 8], axis=1) + np.tile(tiles[:, :2], 2)
        zeros, size = np.zeros(len(tiles), int), (side, side)
        steps[0] = 0
        sys.setprofile(count)
        merge_tiles(tiles, boxes, rng.random(len(tiles)), zeros, size)
        sys.setprofile(None)
        return steps[0] / len(tiles)

    assert steps_of(600) < 1.5 * steps_of(300)
