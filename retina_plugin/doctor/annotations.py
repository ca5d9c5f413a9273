"""What an annotation file in COCO's format holds, checked before Detectron2 reads it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import numpy as np

from .boxes import BoxTable, as_boxes, check_boxes
from .findings import Finding, Severity
from .tally import Kind, Tally

__all__ = ["check_annotations"]

_ERROR, _WARNING, _NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE

_NOT_A_RECORD = Kind(_ERROR, "entries that are no records of keys")
_NO_ID = "entries of {} without an id, or with an id that is no number or text"
_SAME_ID = "entries of {} with the id of another one, of which one would be lost"
_NO_FILE_NAME = Kind(_ERROR, "images without a file_name")
_NO_SIZE = Kind(
    _ERROR, "images whose width or height is missing or no whole number", "add them in pixels"
)
_SAME_FILE = Kind(_WARNING, "images with the file of another one")
_NO_NAME = Kind(_ERROR, "categories without a name")
_SAME_NAME = Kind(_WARNING, "categories with the name of another one")
_NO_BOX = Kind(_ERROR, "annotations without a bbox", "add [x, y, width, height], or remove them")
_NO_IMAGE_ID = Kind(_ERROR, "annotations without an image_id")
_ORPHAN = Kind(_WARNING, "annotations of an image that the file does not have; they are left out")
_UNKNOWN_CATEGORY = Kind(
    _ERROR, "annotations whose category_id is none of the categories'", "correct them"
)
_CROWD = Kind(_ERROR, "annotations whose iscrowd is neither 0 nor 1", "correct them")
_IGNORE = Kind(
    _ERROR, 'annotations with "ignore", which Detectron2 refuses', "write iscrowd 1 instead"
)
_AREA = Kind(_ERROR, "annotations whose area is no number from 0 on", "correct or remove it")
_NO_AREA = Kind(_NOTE, "annotations without an area; that of the box is used")
_SEGMENTATION = Kind(
    _ERROR,
    "annotations whose segmentation is neither polygons nor a mask of counts and size",
    "correct or remove it",
)
_SHORT_POLYGON = Kind(
    _WARNING,
    "annotations without a polygon of 3 points; Detectron2 leaves out their boxes too",
    "remove their segmentation",
)
_KEYPOINTS = Kind(_ERROR, "annotations whose keypoints are no list of numbers", "remove them")


def check_annotations(
    path: str, content: dict[str, Any], *, train: bool, test: bool
) -> Iterator[Finding]:
    """What Detectron2 or pycocotools would fail on, or read wrongly.

    Args:
        path: of the file, for the messages.
        content: what :func:`~retina_plugin.doctor.reading.read_annotations` returned.
        train: it is trained on, so it has to have annotations.
        test: it is evaluated on, so areas are read.
    """
    for key in ("images", "categories", "annotations"):
        if key == "annotations" and key not in content and not train:
            yield Finding(_NOTE, path, "has no annotations, so AP is not computed")
        elif not isinstance(content.get(key), list):
            what = f"has no list of {key}" if key in content else f"has no {key}"
            yield Finding(_ERROR, path, what, "name an annotation file in COCO's format")
        elif not content[key]:
            # AP of nothing is NaN, which is said after the evaluation too
            bad = key != "annotations" or train
            yield Finding(_ERROR if bad else _WARNING, path, f"has no {key}: the list is empty")
    lists = {
        key: content[key] if isinstance(content.get(key), list) else []
        for key in ("images", "categories", "annotations")
    }
    for key, entries in lists.items():
        yield from _check_ids(path, key, entries)
    yield from _check_images(path, lists["images"])
    yield from _check_categories(path, lists["categories"])
    yield from _check_entries(path, lists, test)


def _records(entries: Iterable[Any]) -> Iterator[dict[str, Any]]:
    return (entry for entry in entries if isinstance(entry, dict))


def _check_ids(path: str, key: str, entries: list[Any]) -> Iterator[Finding]:
    tally = Tally(path)
    no_id = Kind(_ERROR, _NO_ID.format(key), "number them")
    # Detectron2 allows it in the files of COCO 2014 that have it.
    allowed = key == "annotations" and "minival" in path
    same_id = Kind(_WARNING if allowed else _ERROR, _SAME_ID.format(key), "number them anew")
    seen: dict[Hashable, int] = {}
    kinds = set()
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            tally.add(_NOT_A_RECORD, f"{key}[{i}], {str(entry)[:40]}")
            continue
        value = entry.get("id")
        if not isinstance(value, (int, float, str)) or value != value:
            tally.add(no_id, _entry_name(key, i, entry))
            continue
        if value in seen:
            both = f"{_entry_name(key, seen[value], entries[seen[value]])} and "
            tally.add(same_id, f"{value!r}, {both}{_entry_name(key, i, entry)}")
        else:
            seen[value] = i
        kinds.add(isinstance(value, str))
    yield from tally.findings(len(entries))
    if len(kinds) > 1:
        yield Finding(_ERROR, path, f"the ids of {key} are numbers and texts", "use one of them")


def _entry_name(key: str, i: int, entry: dict[str, Any]) -> str:
    name = entry.get("file_name", entry.get("name"))
    return f"{key}[{i}]" + (f" {name}" if isinstance(name, str) else "")


def _check_images(path: str, images: list[Any]) -> Iterator[Finding]:
    tally = Tally(path)
    files = set()
    for i, image in enumerate(images):
        if not isinstance(image, dict):
            continue
        name = image.get("file_name")
        if not isinstance(name, str) or not name:
            tally.add(_NO_FILE_NAME, f"images[{i}], id {image.get('id')!r}")
        elif name in files:
            tally.add(_SAME_FILE, f"{name}, id {image.get('id')!r}")
        else:
            files.add(name)
        width, height = image.get("width"), image.get("height")
        if not (_is_side(width) and _is_side(height)):
            tally.add(_NO_SIZE, f"{name}, width {width!r}, height {height!r}")
    yield from tally.findings(len(images))


def _is_side(value: Any) -> bool:
    """Whether it can be a width or height: Detectron2 compares it with the image's by ``==``."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and 0 < value < 2**31  # an integer of JSON may be too large for a float
        and value == value // 1
    )


def _check_categories(path: str, categories: list[Any]) -> Iterator[Finding]:
    tally = Tally(path)
    names = set()
    for category in _records(categories):
        name = category.get("name")
        if not isinstance(name, str) or not name:
            tally.add(_NO_NAME, f"id {category.get('id')!r}")
        elif name in names:
            tally.add(_SAME_NAME, f"{name}, id {category.get('id')!r}")
        names.add(str(name))
    yield from tally.findings(len(categories))


def _check_entries(path: str, lists: dict[str, list[Any]], test: bool) -> Iterator[Finding]:
    """The annotations by themselves, and their boxes."""
    annotations = list(_records(lists["annotations"]))
    images: dict[Any, tuple[int, str, float, float]] = {}
    for i, image in enumerate(_records(lists["images"])):
        sides = (image.get("width"), image.get("height"))
        known = all(map(_is_side, sides))
        width, height = map(float, sides) if known else (np.nan, np.nan)  # type: ignore[arg-type]
        if isinstance(image.get("id"), (int, float, str)):
            images[image["id"]] = (i, str(image.get("file_name")), width, height)
    categories = {
        c["id"]: i
        for i, c in enumerate(_records(lists["categories"]))
        if isinstance(c.get("id"), (int, float, str))
    }

    def describe(annotation: dict[str, Any]) -> str:
        image_id = annotation.get("image_id")
        known = images.get(image_id) if isinstance(image_id, Hashable) else None
        return f"annotation {annotation.get('id')!r} of " + (
            known[1] if known else f"image {image_id!r}"
        )

    tally = Tally(path)
    rows: list[dict[str, Any]] = []
    places: list[tuple[int, str, float, float]] = []
    classes: list[int] = []
    for annotation in annotations:
        image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
        if not isinstance(image_id, (int, float, str)):
            tally.add(_NO_IMAGE_ID, describe(annotation))
        elif image_id not in images:
            tally.add(_ORPHAN, describe(annotation))
        if not isinstance(category_id, Hashable) or category_id not in categories:
            tally.add(_UNKNOWN_CATEGORY, f"category_id {category_id!r}, {describe(annotation)}")
        if annotation.get("bbox") is None:
            tally.add(_NO_BOX, describe(annotation))
        elif isinstance(image_id, (int, float, str)) and image_id in images:
            rows.append(annotation)
            places.append(images[image_id])
            hashable = isinstance(category_id, Hashable)
            classes.append(categories.get(category_id, -1) if hashable else -1)
        _check_optional(annotation, tally, test, describe)
    yield from tally.findings(len(annotations))
    boxes, unreadable = as_boxes([annotation["bbox"] for annotation in rows])
    sizes = np.array([place[2:] for place in places], np.float64).reshape(-1, 2)
    image_index = np.array([place[0] for place in places], np.int64)
    category = np.array(classes, np.int64)

    def name(i: int) -> str:
        width, height = sizes[i]
        return f"{describe(rows[i])} ({width:g}x{height:g})"

    yield from check_boxes(BoxTable(boxes, unreadable, sizes, image_index, category, name), path)


def _check_optional(
    annotation: dict[str, Any], tally: Tally, test: bool, describe: Callable[[dict[str, Any]], str]
) -> None:
    """Keys that Detectron2 and pycocotools read where they are there."""
    crowd = annotation.get("iscrowd", 0)
    if crowd != 0 and crowd != 1:
        tally.add(_CROWD, f"{crowd!r}, {describe(annotation)}")
    if annotation.get("ignore"):
        tally.add(_IGNORE, describe(annotation))
    if test:
        if "area" not in annotation:
            tally.add(_NO_AREA, describe(annotation))
        else:
            area = annotation["area"]
            if not isinstance(area, (int, float)) or not 0 <= area < np.inf:
                tally.add(_AREA, f"{area!r}, {describe(annotation)}")
    segmentation = annotation.get("segmentation")
    if segmentation:
        if isinstance(segmentation, dict):
            right = "counts" in segmentation and "size" in segmentation
        else:
            polygons: list[Any] = segmentation if isinstance(segmentation, list) else [None]
            right = all(isinstance(polygon, list) for polygon in polygons)
            if right and not any(len(p) >= 6 and len(p) % 2 == 0 for p in polygons):
                tally.add(_SHORT_POLYGON, describe(annotation))
        if not right:
            tally.add(_SEGMENTATION, describe(annotation))
    keypoints = annotation.get("keypoints")
    if keypoints and not (
        isinstance(keypoints, list) and all(isinstance(v, (int, float)) for v in keypoints)
    ):
        tally.add(_KEYPOINTS, describe(annotation))
