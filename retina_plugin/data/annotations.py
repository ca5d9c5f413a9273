"""Annotations that cannot be trained on, in records that no check has seen."""

from __future__ import annotations

from typing import Any

from detectron2.structures import BoxMode

from retina_plugin.errors import ConfigError

__all__ = ["check_annotations"]

# Detectron2 reads no others; the last one has an angle, which becomes an upright box.
_NUMBERS = {BoxMode.XYWH_ABS: 4, BoxMode.XYXY_ABS: 4, BoxMode.XYWHA_ABS: 5}
_FARTHEST = 1e9  # pixels; also NaN and infinity are not below it


def check_annotations(file_name: str, annotations: list[dict[str, Any]]) -> None:
    """Check the boxes and classes of an image, in Detectron2's format.

    Raises:
        ConfigError: one cannot be used; the line has the file and the annotation.
    """
    for i, annotation in enumerate(annotations):
        fault = _fault(annotation)
        if fault:
            name = f"id {annotation['id']}" if "id" in annotation else f"number {i + 1}"
            raise ConfigError(
                f"{file_name}: annotation {name} {fault}: correct or remove it "
                "(`retina doctor` lists all)"
            )


def _fault(annotation: dict[str, Any]) -> str:
    for key in ("bbox", "bbox_mode", "category_id"):
        if annotation.get(key) is None:
            return f"has no {key}"
    box, mode, category = (annotation[key] for key in ("bbox", "bbox_mode", "category_id"))
    if mode not in _NUMBERS:
        return f"has bbox_mode {mode!r}, not XYWH_ABS or XYXY_ABS of BoxMode"
    try:
        if len(box) != _NUMBERS[mode] or any(isinstance(x, (str, bool)) for x in box):
            return f"has bbox {box}, which is not {_NUMBERS[mode]} numbers"
        if not all(-_FARTHEST < x < _FARTHEST for x in box):
            return f"has bbox {box}, which is not finite or lies far outside any image"
        width, height = box[2:4]
        if mode == BoxMode.XYXY_ABS:
            width, height = width - box[0], height - box[1]
    except TypeError:
        return f"has bbox {box!r}, which is not {_NUMBERS[mode]} numbers"
    if width < 0 or height < 0:
        return f"has bbox {box} with a negative width or height"
    if isinstance(category, (str, bool)) or int(category) != category or category < 0:
        return f"has category_id {category!r}, not a whole number from 0 on"
    return ""
