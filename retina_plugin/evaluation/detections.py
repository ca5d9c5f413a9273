"""Detections as an evaluator keeps them, one set of arrays per image, and COCO's JSON."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO

__all__ = ["Detections", "as_rows", "fill_in", "optional_import", "prepare_truth"]


def optional_import(name: str) -> ModuleType | None:
    """The module, or None if it is not installed or raises ImportError."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


orjson = optional_import("orjson")  # of the extra "fast"


class Detections(NamedTuple):
    """The detections of one image."""

    image_id: int | str
    boxes: np.ndarray  # (N, 4) float32 XYWH in pixels
    scores: np.ndarray  # (N,) float64
    classes: np.ndarray  # (N,) int64 in [0, K)

    def is_finite(self) -> bool:
        return bool(np.isfinite(self.boxes).all() and np.isfinite(self.scores).all())

    def to_json(self, category_ids: Sequence[int] | None) -> list[dict[str, Any]]:
        """COCO's result format, one dict for each detection.

        Args:
            category_ids: the dataset's id of each class; None if ids are the classes themselves.
        """
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
        """:meth:`to_json` as text, without the brackets."""
        results = self.to_json(category_ids)
        # Detectron2 writes NaN as NaN; orjson would write null
        if orjson is not None and self.is_finite():
            return orjson.dumps(results)[1:-1].decode()
        return json.dumps(results)[1:-1]


def as_rows(predictions: list[Detections], category_ids: list[int] | None) -> np.ndarray:
    """The detections of all images, (N, 7) float64: image id, XYWH, score, category id."""
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


def fill_in(coco: dict[str, Any]) -> None:
    """Add what COCO's metrics need: an area, which is that of the box, and ``iscrowd`` 0.

    Args:
        coco: the content of an annotation file, which is changed.
    """
    for annotation in coco.get("annotations", []):
        annotation.setdefault("iscrowd", 0)
        if annotation.get("area") is None and "bbox" in annotation:
            _, _, width, height = annotation["bbox"]
            annotation["area"] = width * height


def prepare_truth(truth: COCO) -> None:
    """Make an annotation file what pycocotools and hotcoco read rightly.

    - Annotations of images that the file does not have are left out: pycocotools does not read
      them, and hotcoco fails if the image's id is negative or a text.
    - :func:`fill_in`.
    - Annotations are numbered from 1, which changes no metric. pycocotools keeps the id of a match
      as a float, where 0 means that there is none: a text fails, and the detection of an annotation
      with the id 0 counts as a false one. Where two have the same id, as in COCO 2014's minival,
      ids stay: pycocotools counts one of the two twice, and metrics equal its.

    Args:
        truth: as loaded; it is changed.
    """
    if "annotations" not in truth.dataset:
        return
    annotations = [a for a in truth.dataset["annotations"] if a["image_id"] in truth.imgs]
    truth.dataset["annotations"] = annotations
    fill_in(truth.dataset)
    if len({annotation["id"] for annotation in annotations}) == len(annotations):
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number
    truth.anns = {annotation["id"]: annotation for annotation in annotations}
