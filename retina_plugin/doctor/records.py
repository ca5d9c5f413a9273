"""Records of a dataset that a user's function gives, in Detectron2's format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from .boxes import BoxTable, as_boxes, check_boxes
from .findings import Finding, Severity
from .tally import Kind, Tally

__all__ = ["check_records"]

_ERROR, _WARNING = Severity.ERROR, Severity.WARNING

_NOT_A_RECORD = Kind(_ERROR, "entries that are no records of keys")
_NO_FILE_NAME = Kind(_ERROR, "records without a file_name")
_NO_SIZE = "records whose height or width is missing or no whole number"
_NO_IMAGE_ID = "records without an image_id"
_SAME_IMAGE_ID = Kind(_ERROR, "records with the image_id of another one", "number them anew")
_NO_ANNOTATIONS = Kind(
    _ERROR, "records without annotations", "give an empty list to an image without objects"
)
_NO_BOX = Kind(_ERROR, "annotations without a bbox", "add it, or remove them")
_NO_MODE = Kind(
    _ERROR,
    "annotations whose bbox_mode is neither BoxMode.XYWH_ABS nor BoxMode.XYXY_ABS",
    "set it: Detectron2 reads no other boxes",
)
_CATEGORY = Kind(
    _ERROR,
    "annotations whose category_id is no whole number from 0 to the number of classes less 1",
    "number the classes from 0",
)


def check_records(
    where: str, records: list[Any], num_classes: int, *, train: bool, test: bool
) -> Iterator[Finding]:
    """Missing keys and impossible values, with the record named, and the boxes.

    Args:
        where: the dataset.
        records: what the function of the ``DatasetCatalog`` returned.
        num_classes: classes are numbered below it.
        train: annotations are needed.
        test: sizes and image ids are needed.
    """
    if not records:
        yield Finding(_ERROR, where, "has no images: its function returns an empty list")
        return
    # A training fills in sizes and does without ids.
    severity = _ERROR if test else _WARNING
    no_size, no_id = Kind(severity, _NO_SIZE, "add them"), Kind(severity, _NO_IMAGE_ID, "add one")
    tally, annotation_tally = Tally(where), Tally(where)
    seen = set()
    rows: list[tuple[int, int, dict[str, Any]]] = []  # of record and annotation
    sizes: list[tuple[float, float]] = []
    names: list[str] = []
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            tally.add(_NOT_A_RECORD, f"number {i}, {str(record)[:40]}")
            names.append("")
            continue
        name = str(record.get("file_name", f"record {i}"))
        names.append(name)
        if "file_name" not in record:
            tally.add(_NO_FILE_NAME, f"record {i}")
        width, height = record.get("width"), record.get("height")
        if not (_is_size(width) and _is_size(height)):
            tally.add(no_size, f"{name}, height {height!r}, width {width!r}")
            width = height = None
        image_id = record.get("image_id")
        if not isinstance(image_id, (int, str, np.integer)):
            tally.add(no_id, name)
        elif image_id in seen and test:
            tally.add(_SAME_IMAGE_ID, f"{image_id!r}, {name}")
        else:
            seen.add(image_id)
        annotations = record.get("annotations")
        if not isinstance(annotations, list):
            if train:
                tally.add(_NO_ANNOTATIONS, name)
            continue
        for k, annotation in enumerate(annotations):
            if not isinstance(annotation, dict):
                annotation_tally.add(_NOT_A_RECORD, f"annotation {k} of {name}")
                continue
            rows.append((i, k, annotation))
            sizes.append((width or np.nan, height or np.nan))
    yield from tally.findings(len(records))

    def describe(row: int) -> str:
        i, k, annotation = rows[row]
        return f"annotation {annotation.get('id', k)!r} of {names[i]}"

    corners = np.zeros(len(rows), bool)
    usable = np.zeros(len(rows), bool)
    categories = np.full(len(rows), -1)
    raw: list[Any] = []
    for row, (_, _, annotation) in enumerate(rows):
        mode, category = annotation.get("bbox_mode"), annotation.get("category_id")
        if annotation.get("bbox") is None:
            annotation_tally.add(_NO_BOX, describe(row))
        elif mode == BoxMode.XYWHA_ABS and not test:
            raw.append(_upright(annotation["bbox"]))
            usable[row] = corners[row] = True
        elif mode not in (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS):
            annotation_tally.add(_NO_MODE, f"{mode!r}, {describe(row)}")
        else:
            raw.append(annotation["bbox"])
            usable[row], corners[row] = True, mode == BoxMode.XYXY_ABS
        if not isinstance(category, (int, np.integer)) or not 0 <= category < num_classes:
            annotation_tally.add(_CATEGORY, f"{category!r}, {describe(row)}")
        else:
            categories[row] = category
    yield from annotation_tally.findings(len(rows))
    (index,) = np.nonzero(usable)
    boxes, unreadable = as_boxes(raw)
    boxes[corners[index], 2:] -= boxes[corners[index], :2]
    table = BoxTable(
        boxes=boxes,
        unreadable=unreadable,
        sizes=np.array(sizes, np.float64).reshape(-1, 2)[index],
        image=np.array([rows[row][0] for row in index], np.int64),
        category=categories[index],
        describe=lambda i: describe(index[i]),
    )
    yield from check_boxes(table, where)


def _upright(box: Any) -> Any:
    """The corners around a box with an angle, which is what a training makes of it."""
    try:
        return list(BoxMode.convert(tuple(box), BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS))
    except (TypeError, ValueError, AssertionError):
        return None


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value > 0)
