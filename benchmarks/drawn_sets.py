"""Two drawn datasets of other shape than the digits, for ``python -m benchmarks.init_recipe``.

Objects are drawn on random crops of scikit-learn's two photos, as the embedded digits are.
``cells`` has few images with many small boxes of two classes; ``rods`` has one class of long thin
boxes. Each has train, dev (to try rules) and val (to report), drawn from different random streams.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from sklearn.datasets import load_sample_images

from retina_plugin.cache import atomic_write

__all__ = ["SETS", "DrawnSet", "write_set"]

# image BGR uint8, boxes XYWH in whole pixels, classes
Scene = tuple[np.ndarray, list[list[int]], list[int]]
Photos = list[np.ndarray]
_SPLITS = ("train", "dev", "val")
_TRIES = 50  # to find a free place for an object; otherwise it is left out
_CONTRAST = 60.0  # grey levels between an object and what it covers


class DrawnSet:
    """A dataset: how many images a split has, and what draws one.

    Args:
        classes: their names.
        num_images: of train, dev and val.
        draw: draws a scene.
    """

    def __init__(
        self,
        classes: list[str],
        num_images: tuple[int, int, int],
        draw: Callable[[np.random.Generator, Photos], Scene],
    ) -> None:
        self.classes, self.num_images, self.draw = classes, num_images, draw


def _cells(rng: np.random.Generator, photos: Photos) -> Scene:
    """A scene of 192 px with 20 to 40 discs and rings of 6 to 14 px."""
    image = _crop(rng, photos, (192, 192))
    boxes: list[list[int]] = []
    classes: list[int] = []
    for _ in range(int(rng.integers(20, 41))):
        side = int(rng.integers(6, 15))
        box = _free_place(rng, image, boxes, side, side)
        if box is None:
            continue
        x, y, _, _ = box
        kind = int(rng.integers(2))
        _paint(rng, image, _disc(image.shape[:2], x, y, side, is_ring=kind == 1))
        boxes.append(box)
        classes.append(kind)
    return image, boxes, classes


def _disc(shape: tuple[int, ...], x: int, y: int, side: int, is_ring: bool) -> np.ndarray:
    """(H, W) opacity in [0, 1], drawn at eight times the size."""
    k = 8
    fine = np.zeros((shape[0] * k, shape[1] * k), np.uint8)
    centre = (round((x + side / 2) * k), round((y + side / 2) * k))
    cv2.circle(fine, centre, round(side / 2 * k), 255, -1)
    if is_ring:
        cv2.circle(fine, centre, round(side / 4 * k), 0, -1)
    return cv2.resize(fine, shape[::-1], interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _rods(rng: np.random.Generator, photos: Photos) -> Scene:
    """A scene of 240 x 160 px with 1 to 5 rods, 50 to 150 px long and 5 to 9 times less wide."""
    image = _crop(rng, photos, (160, 240))
    boxes: list[list[int]] = []
    for _ in range(int(rng.integers(1, 6))):
        length = float(np.exp(rng.uniform(np.log(50), np.log(150))))
        width = max(5, round(length / rng.uniform(5, 9)))
        sides = (round(length), width) if rng.uniform() < 0.7 else (width, round(length))
        box = _free_place(rng, image, boxes, *sides)
        if box is None:
            continue
        x, y, w, h = box
        mask = np.zeros(image.shape[:2], np.float32)
        mask[y : y + h, x : x + w] = 1.0
        _paint(rng, image, mask)
        boxes.append(box)
    return image, boxes, [0] * len(boxes)


def _crop(rng: np.random.Generator, photos: Photos, shape: tuple[int, int]) -> np.ndarray:
    photo = photos[int(rng.integers(len(photos)))]
    scale = rng.uniform(1.0, min(n / m for n, m in zip(photo.shape, shape)))
    h, w = (int(n * scale) for n in shape)
    y, x = (int(rng.integers(n - m + 1)) for n, m in zip(photo.shape, (h, w)))
    part = photo[y : y + h, x : x + w]
    return cv2.resize(part, shape[::-1], interpolation=cv2.INTER_AREA).astype(np.float32)


def _free_place(
    rng: np.random.Generator, image: np.ndarray, boxes: list[list[int]], w: int, h: int
) -> list[int] | None:
    height, width = image.shape[:2]
    if w > width or h > height:
        return None
    for _ in range(_TRIES):
        x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
        if not any(x < a + c and a < x + w and y < b + d and b < y + h for a, b, c, d in boxes):
            return [x, y, w, h]
    return None


def _paint(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray) -> None:
    """Cover with a random colour whose grey differs enough from what is under it."""
    grey = np.array([0.114, 0.587, 0.299], np.float32)
    covered = float((image @ grey * mask).sum() / mask.sum())
    while True:
        colour = rng.uniform(0, 255, 3).astype(np.float32)
        if abs(float(colour @ grey) - covered) >= _CONTRAST:
            break
    image += mask[:, :, None] * (colour - image)


SETS: dict[str, DrawnSet] = {
    "cells": DrawnSet(["disc", "ring"], (40, 40, 100), _cells),
    "rods": DrawnSet(["rod"], (1000, 100, 200), _rods),
}


def write_set(name: str, folder: Path) -> dict[str, str]:
    """Write a set in COCO format if it is not there yet; split -> its name for ``DATASETS``."""
    root = folder / name
    if not root.is_dir():
        with atomic_write(root) as partial:
            partial.mkdir()
            photos = [image[:, :, ::-1].copy() for image in load_sample_images().images]
            chosen = SETS[name]
            for stream, (split, count) in enumerate(zip(_SPLITS, chosen.num_images)):
                rng = np.random.default_rng([list(SETS).index(name), stream])
                scenes = [chosen.draw(rng, photos) for _ in range(count)]
                _write_split(partial, split, scenes, chosen.classes)
    return {split: f"coco:{root / split}.json:{root / split}" for split in _SPLITS}


def _write_split(root: Path, split: str, scenes: list[Scene], classes: list[str]) -> None:
    (root / split).mkdir()
    images, annotations = [], list[dict[str, Any]]()
    for index, (image, boxes, labels) in enumerate(scenes, start=1):
        name, (height, width) = f"{index:04d}.png", image.shape[:2]
        pixels = np.clip(image.round(), 0, 255).astype(np.uint8)
        (root / split / name).write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
        images.append({"id": index, "file_name": name, "height": height, "width": width})
        for box, label in zip(boxes, labels):
            number = len(annotations) + 1  # not 0: pycocotools reads it as "no match"
            annotations.append(
                {"id": number, "image_id": index, "category_id": label + 1, "bbox": box}
                | {"area": box[2] * box[3], "iscrowd": 0}
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(classes)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (root / f"{split}.json").write_text(json.dumps(coco))
