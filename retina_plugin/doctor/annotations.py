"""What an annotation file in COCO's format holds, checked before Detectron2 reads it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import numpy as np

from .boxes import BoxTable, as_boxes, check_boxes
from .findings import Finding, Severity
from .tally import Kind, Tally

__all__ = ["check_annotations"]

_ERROR, _WARNING, _NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE

_ID_TYPES = frozenset((int, float, str))
_MASK = frozenset(("counts", "size"))

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
_ZERO_AREA = Kind(_WARNING, "annotations whose area is 0: COCO's APs counts them as small")
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
    path: str, content: dict[str, Any], *, train: bool, test: bool, all_keys: bool = True
) -> Iterator[Finding]:
    """What Detectron2 or pycocotools would fail on, or read wrongly.

    Args:
        path: of the file, for the messages.
        content: what :func:`~retina_plugin.doctor.reading.read_annotations` returned.
        train: it is trained on, so it has to have annotations.
        test: it is evaluated on, so areas are read.
        all_keys: False: another function gives the images' files and sizes.
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
    if all_keys:
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
        if type(entry) is not dict:
            tally.add(_NOT_A_RECORD, f"{key}[{i}], {str(entry)[:40]}")
            continue
        value = entry.get("id")
        if type(value) not in _ID_TYPES or value != value:
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
    images = {
        image["id"]: i
        for i, image in enumerate(lists["images"])
        if isinstance(image, dict) and type(image.get("id")) in _ID_TYPES
    }
    categories = {
        category["id"]: i
        for i, category in enumerate(_records(lists["categories"]))
        if type(category.get("id")) in _ID_TYPES
    }

    def describe(annotation: dict[str, Any]) -> str:
        image_id = annotation.get("image_id")
        known = images.get(image_id) if type(image_id) in _ID_TYPES else None
        name = f"image {image_id!r}" if known is None else lists["images"][known].get("file_name")
        return f"annotation {annotation.get('id')!r} of {name}"

    tally = Tally(path)
    rows: list[dict[str, Any]] = []
    places: list[int] = []
    classes: list[int] = []
    orphans: list[dict[str, Any]] = []
    for annotation in annotations:  # the one loop that is long: COCO has 860,000
        image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
        place = images.get(image_id) if type(image_id) in _ID_TYPES else None
        category = categories.get(category_id) if type(category_id) in _ID_TYPES else None
        if place is None and type(image_id) in _ID_TYPES:
            orphans.append(annotation)
        elif place is None:
            tally.add(_NO_IMAGE_ID, describe(annotation))
        if category is None:
            tally.add(_UNKNOWN_CATEGORY, f"category_id {category_id!r}, {describe(annotation)}")
        if annotation.get("bbox") is None:
            tally.add(_NO_BOX, describe(annotation))
        elif place is not None:
            rows.append(annotation)
            places.append(place)
            classes.append(-1 if category is None else category)
        for kind, example in _optional_faults(annotation, test):
            tally.add(kind, f"{example}{describe(annotation)}")
    if images and orphans and len(orphans) == len(annotations):
        # some are left out, but without any there is nothing to learn or to measure
        what = (
            f"has no annotation of an image that it has ({len(orphans)} annotations, the first: "
            f"image_id {orphans[0]['image_id']!r}; {len(images)} images, the first: id "
            f"{next(iter(images))!r})"
        )
        fix = "give image_id the images' ids: in both as numbers, or in both as texts"
        yield Finding(_ERROR, path, what, fix)
    else:
        for annotation in orphans:
            tally.add(_ORPHAN, describe(annotation))
    yield from tally.findings(len(annotations))
    boxes, unreadable = as_boxes([annotation["bbox"] for annotation in rows])
    image_index = np.array(places, np.int64)
    sizes = np.array([_size(image) for image in lists["images"]], np.float64).reshape(-1, 2)
    sizes = sizes[image_index]
    category_index = np.array(classes, np.int64)

    def name(i: int) -> str:
        width, height = sizes[i]
        return f"{describe(rows[i])} ({width:g}x{height:g})"

    yield from check_boxes(
        BoxTable(boxes, unreadable, sizes, image_index, category_index, name), path
    )


def _size(image: Any) -> tuple[Any, Any]:
    """Width and height; NaN if they are not known."""
    if not isinstance(image, dict):
        return np.nan, np.nan
    width, height = image.get("width"), image.get("height")
    return (width, height) if _is_side(width) and _is_side(height) else (np.nan, np.nan)


def _optional_faults(annotation: dict[str, Any], test: bool) -> Iterator[tuple[Kind, str]]:
    """Of keys that Detectron2 and pycocotools read where they are there: kind, wrong value."""
    if "iscrowd" in annotation and annotation["iscrowd"] not in (0, 1):
        yield _CROWD, f"{annotation['iscrowd']!r}, "
    if annotation.get("ignore"):
        yield _IGNORE, ""
    area = annotation.get("area")
    if area == 0:
        yield _ZERO_AREA, ""
    elif test:
        if "area" not in annotation:
            yield _NO_AREA, ""
        elif not isinstance(area, (int, float)) or not 0 <= area < np.inf:
            yield _AREA, f"{area!r}, "
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list):
        if not all([type(polygon) is list for polygon in segmentation]):
            yield _SEGMENTATION, ""
        elif segmentation and not any([len(p) > 5 and len(p) % 2 == 0 for p in segmentation]):
            yield _SHORT_POLYGON, ""
    elif segmentation and not (isinstance(segmentation, dict) and _MASK <= segmentation.keys()):
        yield _SEGMENTATION, ""
    keypoints = annotation.get("keypoints")
    if keypoints and not (
        isinstance(keypoints, list) and all([isinstance(v, (int, float)) for v in keypoints])
    ):
        yield _KEYPOINTS, ""
