"""What an evaluator keeps of the detections: arrays, an image each, and how they are written."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Detections", "as_rows", "optional"]


def optional(name: str) -> ModuleType | None:
    """The module, or None where it is not installed or cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


orjson = optional("orjson")  # of the extra "fast"


class Detections(NamedTuple):
    """What was found in one image."""

    image_id: Any
    boxes: np.ndarray  # (N, 4) float32, x, y, width, height in pixels
    scores: np.ndarray  # (N,) float64
    classes: np.ndarray  # (N,) int64, from 0

    def is_finite(self) -> bool:
        return bool(np.isfinite(self.boxes).all() and np.isfinite(self.scores).all())

    def to_json(self, category_ids: Sequence[int] | None) -> list[dict[str, Any]]:
        """COCO's result format; ``category_ids`` are the dataset's, by class."""
        classes = self.classes.tolist()
        return [
            {
                "image_id": self.image_id,
                "category_id": category_ids[k] if category_ids else k,
                "bbox": box,
                "score": score,
            }
            for box, score, k in zip(self.boxes.tolist(), self.scores.tolist(), classes)
        ]

    def encode(self, category_ids: Sequence[int] | None) -> str:
        """:meth:`to_json` as text, without the brackets; NaN as NaN, which orjson doesn't know."""
        results = self.to_json(category_ids)
        if orjson is not None and self.is_finite():
            return orjson.dumps(results)[1:-1].decode()
        return json.dumps(results)[1:-1]


def as_rows(predictions: list[Detections], category_ids: list[int] | None) -> np.ndarray:
    """(N, 7) float64: image id, x, y, width, height, score, category id."""
    counts = [len(p.scores) for p in predictions]
    classes = np.concatenate([p.classes for p in predictions])
    return np.column_stack(
        [
            np.repeat(np.array([p.image_id for p in predictions], np.float64), counts),
            np.concatenate([p.boxes for p in predictions]).astype(np.float64),
            np.concatenate([p.scores for p in predictions]),
            np.array(category_ids)[classes] if category_ids else classes,
        ]
    )
