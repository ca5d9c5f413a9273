"""The objects of a dataset as arrays, whatever ids its annotation file uses."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict

from retina_plugin.doctor.datasets import dataset_records
from retina_plugin.doctor.reading import read_annotations
from retina_plugin.errors import ConfigError, first_line
from retina_plugin.evaluation.detections import fill_in

__all__ = ["GroundTruth", "as_boxes", "read_ground_truth"]

logger = logging.getLogger("retina_plugin")


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """The images, classes and objects of a dataset. Images and classes are numbered by their id.

    I images, K classes, G objects.

    Args:
        name: of the dataset.
        image_ids: (I,) the annotation file's.
        file_names: (I,) as the annotation file has them; "" where it has none.
        image_root: the folder that they are in.
        sizes: (I, 2) width and height in pixels; NaN where the file does not say.
        category_ids: (K,) the annotation file's.
        class_names: (K,).
        images, classes: (G,) image and class of each object, as an index.
        boxes: (G, 4) XYWH in pixels.
        areas: (G,) in pixels, by which COCO tells small from large.
        crowds: (G,) whether the box holds a crowd, on which detections do not count.
    """

    name: str
    image_ids: Sequence[Any]
    file_names: Sequence[str]
    image_root: str
    sizes: np.ndarray
    category_ids: Sequence[Any]
    class_names: Sequence[str]
    images: np.ndarray
    classes: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowds: np.ndarray

    @classmethod
    def from_coco(cls, coco: dict[str, Any], name: str, image_root: str = "") -> GroundTruth:
        """Of the content of an annotation file in COCO's format.

        A missing ``iscrowd`` is 0, and a missing area is that of the box, as in an evaluation. Ids
        may be numbers or texts. Annotations of images that the file does not have are left out, as
        pycocotools does.

        Raises:
            ConfigError: it has no images, classes or annotations, or an annotation has no box, no
                right area or another class; the line names it.
        """
        for key in ("images", "categories", "annotations"):
            if not isinstance(coco.get(key), list):
                raise ConfigError(f"{name} has no {key}: a report needs them")
        annotations = [a for a in coco["annotations"] if isinstance(a, dict)]
        try:
            images = _by_id(coco["images"])
            categories = _by_id(coco["categories"])
            annotations = _of_images(annotations, images, name)
            fill_in({"annotations": annotations})
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{name}: an image, category or annotation is incomplete ({first_line(error)}): "
                "`retina doctor` names it"
            ) from None
        if not images or not categories:
            raise ConfigError(f"{name} has no {'classes' if images else 'images'}")
        return cls(
            name=name,
            image_ids=tuple(images),
            file_names=tuple(str(image.get("file_name", "")) for image in images.values()),
            image_root=image_root,
            sizes=np.array([_size(image) for image in images.values()], np.float64),
            category_ids=tuple(categories),
            class_names=tuple(str(c.get("name", i)) for i, c in categories.items()),
            images=_places((a["image_id"] for a in annotations), images),
            classes=_classes(annotations, categories, name),
            boxes=as_boxes([a.get("bbox") for a in annotations], f"annotation {{}} of {name}"),
            areas=_areas(annotations, name),
            crowds=np.array([bool(a["iscrowd"]) for a in annotations], bool),
        )

    def path(self, image: int) -> str:
        """The file of an image."""
        return os.path.join(self.image_root, self.file_names[image])


def read_ground_truth(dataset: str) -> GroundTruth:
    """The ground truth of a registered dataset.

    A dataset without an annotation file is converted to COCO's format, as Detectron2's evaluator
    does it: boxes are rounded to thousandths of a pixel.

    Raises:
        ConfigError: no dataset has that name, its file cannot be read, or it is incomplete.
    """
    if dataset not in DatasetCatalog:
        dataset_records(dataset)  # raises the line
    metadata = MetadataCatalog.get(dataset)
    file, prepare = metadata.get("json_file"), metadata.get("prepare")
    if file is None or (prepare is not None and not os.path.isfile(file)):
        dataset_records(dataset)  # its function may fail, or write the file
    if file is not None:
        return GroundTruth.from_coco(
            read_annotations(file), dataset, metadata.get("image_root") or ""
        )
    try:
        coco = convert_to_coco_dict(dataset)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{dataset} cannot be converted to COCO's format ({first_line(error)}): `retina "
            "doctor` names what is missing"
        ) from None
    return GroundTruth.from_coco(coco, dataset)


def as_boxes(boxes: Sequence[Any], where: str) -> np.ndarray:
    """(N, 4) float64.

    Args:
        boxes: N lists.
        where: names a box by its place, which goes to "{}".

    Raises:
        ConfigError: one is not 4 finite numbers, or has a negative size.
    """
    try:
        table = np.array(boxes, np.float64).reshape(len(boxes), 4)
        bad = ~np.isfinite(table).all(axis=1) | (table[:, 2:] < 0).any(axis=1)
        first = int(bad.argmax()) if bad.any() else None
    except (TypeError, ValueError):
        first = next(i for i, box in enumerate(boxes) if not _is_box(box))
    if first is not None:
        raise ConfigError(
            f"{where.format(first + 1)} has the box {boxes[first]!r:.80}: give x, y, width and "
            "height in pixels"
        )
    return table


def _is_box(box: Any) -> bool:
    try:
        return len(box) == 4 and all(math.isfinite(float(x)) for x in box)
    except (TypeError, ValueError):
        return False


def _size(image: dict[str, Any]) -> tuple[float, float]:
    width, height = image.get("width"), image.get("height")
    known = all(isinstance(x, (int, float)) and 0 < x < 1e6 for x in (width, height))
    return (width, height) if known else (math.nan, math.nan)  # type: ignore[return-value]


def _by_id(entries: list[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """In the order of their ids, in which pycocotools goes through them."""
    found = {entry["id"]: entry for entry in entries}
    try:
        return dict(sorted(found.items()))
    except TypeError:  # numbers and texts
        return dict(sorted(found.items(), key=lambda x: (str(type(x[0])), x[0])))


def _of_images(
    annotations: list[dict[str, Any]], images: dict[Any, Any], name: str
) -> list[dict[str, Any]]:
    kept = [a for a in annotations if a.get("image_id") in images]
    if len(kept) < len(annotations):
        logger.warning(
            "%s: %d annotations are of images that the file does not have: they are left out",
            name,
            len(annotations) - len(kept),
        )
    return kept


def _classes(
    annotations: list[dict[str, Any]], categories: dict[Any, Any], name: str
) -> np.ndarray:
    try:
        return _places((a.get("category_id") for a in annotations), categories)
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{name}: an annotation is of the class {error.args[0]!r:.80}, which the file does not "
            "have: `retina doctor` names all"
        ) from None


def _places(ids: Iterable[Any], known: dict[Any, Any]) -> np.ndarray:
    place = {i: k for k, i in enumerate(known)}
    return np.array([place[i] for i in ids], np.int64)


def _areas(annotations: list[dict[str, Any]], name: str) -> np.ndarray:
    for i, annotation in enumerate(annotations, start=1):
        area = annotation["area"]
        known = isinstance(area, (int, float)) and not isinstance(area, bool)
        if not known or not 0 <= area < math.inf:
            raise ConfigError(
                f"annotation {i} of {name} has the area {area!r:.80}: give square pixels, or leave "
                "it out for that of the box"
            )
    return np.array([a["area"] for a in annotations], np.float64)
