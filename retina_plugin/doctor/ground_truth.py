"""The ground-truth boxes of a training set as arrays, and Detectron2's resizing of many images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.structures import BoxMode

__all__ = ["GroundTruth", "resized_shapes", "training_sizes"]


@dataclass(frozen=True)
class GroundTruth:
    """G boxes of I images, as training would see them, except for the resizing.

    Args:
        boxes_G4: XYXY in pixels of the images, clipped to them, with an area; float64.
        classes_G: their classes, in [0, K).
        image_G: their images, in [0, I).
        whole_G: whether all four numbers are integers. Detectron2 resizes such a box in integers:
            fractions are cut off.
        shapes_I2: (height, width) of the images.
        files: names of the images' files.
        num_dropped: boxes that training does not see or cannot read: crowds, boxes without area
            or outside the image, what is no box.
    """

    boxes_G4: np.ndarray
    classes_G: np.ndarray
    image_G: np.ndarray
    whole_G: np.ndarray
    shapes_I2: np.ndarray
    files: tuple[str, ...]
    num_dropped: int = 0

    @classmethod
    def from_records(cls, records: Iterable[Any]) -> GroundTruth:
        """Read Detectron2's dataset records.

        What cannot be read is left out, and so is an image whose size is not recorded: other checks
        say so.
        """
        boxes: list[list[float]] = []
        classes: list[int] = []
        images: list[int] = []  # one a box
        whole: list[bool] = []
        shapes: list[tuple[int, int]] = []
        files: list[str] = []
        num_dropped = 0
        for record in records:
            if not isinstance(record, dict):
                continue
            height, width = record.get("height", 0), record.get("width", 0)
            annotations = record.get("annotations")
            annotations = annotations if isinstance(annotations, (list, tuple)) else ()
            if not _is_positive(height) or not _is_positive(width):
                num_dropped += len(annotations)
                continue
            for annotation in annotations:
                box = _box(annotation) if isinstance(annotation, dict) else None
                if box is None:
                    num_dropped += 1
                    continue
                boxes.append(box)
                classes.append(annotation["category_id"])
                images.append(len(shapes))
                whole.append(all(isinstance(x, (int, np.integer)) for x in annotation["bbox"]))
            shapes.append((int(height), int(width)))
            files.append(str(record.get("file_name", "")))
        boxes_G4 = np.array(boxes, dtype=np.float64).reshape(-1, 4)
        image_G = np.array(images, dtype=np.int64)
        shapes_I2 = np.array(shapes, dtype=np.int64).reshape(-1, 2)
        limits_G2 = shapes_I2[image_G][:, ::-1]
        boxes_G4 = np.minimum(boxes_G4.clip(min=0), np.tile(limits_G2, 2))
        # Detectron2's filter_empty_instances; False for NaN
        seen = ((boxes_G4[:, 2:] - boxes_G4[:, :2]) > 1e-5).all(axis=1)
        return cls(
            boxes_G4[seen],
            np.array(classes, dtype=np.int64)[seen],
            image_G[seen],
            np.array(whole, dtype=bool)[seen],
            shapes_I2,
            tuple(files),
            num_dropped + int((~seen).sum()),
        )

    def resized(self, short: int, max_size: int) -> tuple[np.ndarray, np.ndarray]:
        """(G, 4) boxes and (I, 2) shapes after Detectron2's resizing, see ``resized_shapes``."""
        shapes_I2 = resized_shapes(self.shapes_I2, short, max_size)
        scale_I2 = shapes_I2 / self.shapes_I2
        boxes_G4 = self.boxes_G4 * np.tile(scale_I2[self.image_G][:, ::-1], 2)
        boxes_G4[self.whole_G] = np.floor(boxes_G4[self.whole_G])
        return boxes_G4, shapes_I2

    def take(self, index: np.ndarray) -> GroundTruth:
        """Some of the boxes; the images stay."""
        return GroundTruth(
            self.boxes_G4[index],
            self.classes_G[index],
            self.image_G[index],
            self.whole_G[index],
            self.shapes_I2,
            self.files,
        )


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and bool(value > 0)


def _box(annotation: dict[str, Any]) -> list[float] | None:
    """XYXY in pixels; None for a crowd and for what is no box."""
    mode = annotation.get("bbox_mode")
    if annotation.get("iscrowd", 0) or not isinstance(
        annotation.get("category_id"), (int, np.integer)
    ):
        return None
    try:
        x, y, a, b = map(float, annotation["bbox"])
    except (KeyError, TypeError, ValueError):
        return None
    if mode == BoxMode.XYWH_ABS:
        return [x, y, x + a, y + b]
    return [x, y, a, b] if mode == BoxMode.XYXY_ABS else None


def training_sizes(cfg: CfgNode) -> list[int]:
    """The shorter sides of ``INPUT.MIN_SIZE_TRAIN``; five of them for "range"."""
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    sizes = [sizes] if isinstance(sizes, int) else list(sizes)
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range":
        return sorted({round(size) for size in np.linspace(min(sizes), max(sizes), 5)})
    return sizes  # one that stands there twice is drawn twice as often


def resized_shapes(shapes_I2: np.ndarray, short: int, max_size: int) -> np.ndarray:
    """(I, 2) (height, width) after Detectron2's ``ResizeShortestEdge``; ``short`` 0: unchanged."""
    if short == 0:
        return shapes_I2
    height, width = shapes_I2.T.astype(np.float64)
    # the same operations in the same order as in ResizeShortestEdge.get_output_shape
    scale = float(short) / np.minimum(height, width)
    new = np.stack(
        [
            np.where(height < width, short, scale * height),
            np.where(height < width, scale * width, short),
        ]
    )
    longer = new.max(axis=0)
    new *= np.where(longer > max_size, max_size / longer, 1.0)
    return (new + 0.5).astype(np.int64).T
