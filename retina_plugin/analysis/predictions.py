"""The detections of a result file as arrays, matched with the images and classes of a dataset."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from retina_plugin.doctor.reading import read_json
from retina_plugin.errors import ConfigError, did_you_mean

from .ground_truth import GroundTruth, as_boxes

__all__ = ["Found", "read_predictions"]

logger = logging.getLogger("retina_plugin")

_LOW = 0.1  # evaluations keep detections from .05 on


@dataclass(frozen=True, eq=False)
class Found:
    """N detections.

    Args:
        images, classes: (N,) indices into the images and classes of a :class:`GroundTruth`.
        boxes: (N, 4) XYWH in pixels.
        scores: (N,) probabilities.
    """

    images: np.ndarray
    classes: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: np.ndarray) -> Found:
        return Found(self.images[index], self.classes[index], self.boxes[index], self.scores[index])


def read_predictions(
    source: str | os.PathLike | Sequence[dict[str, Any]], truth: GroundTruth
) -> Found:
    """Detections in COCO's result format: ``image_id``, ``category_id``, ``bbox`` and ``score``.

    Entries of ``retina predict`` also have ``file_name`` and ``category_name``, which are then what
    they are matched by: its ids need not be those of the dataset.

    Args:
        source: a JSON file, or its content.
        truth: the dataset that they are of.

    Raises:
        ConfigError: it cannot be read, is no such list, or is of other images or classes.
    """
    where = "the predictions"
    if isinstance(source, (str, os.PathLike)):
        where = os.fspath(source)
        source = read_json(source)
    entries = _checked(source, where)
    classes = _classes(entries, truth, where)
    scores = _scores(entries, where)
    if len(scores) and scores.min() > _LOW:
        logger.warning(
            "%s: no score is below %.2f. If they were cut there, AP is too low and misses are too "
            "many: take those of an evaluation, or of `retina predict --score 0.05`",
            where,
            scores.min(),
        )
    boxes = as_boxes([e["bbox"] for e in entries], f"{where}: detection {{}}")
    return Found(_images(entries, truth, where), classes, boxes, scores)


def _checked(content: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        raise ConfigError(
            f"{where}: holds the ground truth of a dataset: give the detections, such as "
            "coco_instances_results.json"
        )
    if not isinstance(content, list):
        raise ConfigError(
            f"{where}: holds a {type(content).__name__}, not a list of detections in COCO's format"
        )
    needed = {"image_id", "category_id", "bbox", "score"}
    for i, entry in enumerate(content):
        if not isinstance(entry, dict):
            raise ConfigError(f"{where}: entry {i + 1} is {entry!r:.40}, not a detection")
        if not entry.keys() >= needed:
            missing = ", ".join(sorted(needed - entry.keys()))
            raise ConfigError(f"{where}: detection {i + 1} has no {missing}")
    if any("frame" in entry for entry in content):
        raise ConfigError(f"{where}: holds frames of a video, which are no images of a dataset")
    return content


def _scores(entries: list[dict[str, Any]], where: str) -> np.ndarray:
    values = [entry["score"] for entry in entries]
    for i, score in enumerate(values):
        if not isinstance(score, (int, float)) or not 0 <= score <= 1:  # NaN is neither
            raise ConfigError(
                f"{where}: detection {i + 1} has the score {score!r:.40}: give a probability from "
                "0 to 1"
            )
    return np.array(values, np.float64)


def _classes(entries: list[dict[str, Any]], truth: GroundTruth, where: str) -> np.ndarray:
    place: dict[Any, int]
    names = {name: k for k, name in enumerate(truth.class_names)}
    by_name = len(names) == len(truth.class_names) and all("category_name" in e for e in entries)
    key = "category_name" if by_name else "category_id"
    place = names if by_name else {i: k for k, i in enumerate(truth.category_ids)}
    try:
        return np.array([place[entry[key]] for entry in entries], np.int64)
    except (KeyError, TypeError):
        first = next(e[key] for e in entries if not _has(place, e[key]))
        hint = did_you_mean(str(first), names) if by_name else ""
        raise ConfigError(
            f"{where}: a detection is of the class {first!r:.80}, which {truth.name} does not "
            f"have{hint}: are these the predictions of another dataset?"
        ) from None


def _images(entries: list[dict[str, Any]], truth: GroundTruth, where: str) -> np.ndarray:
    place: dict[Any, int] = {i: k for k, i in enumerate(truth.image_ids)}
    key = "image_id"
    has_files = all(isinstance(entry.get("file_name"), str) for entry in entries)
    if entries and has_files and any(truth.file_names):
        place, key = _match_files({entry["file_name"] for entry in entries}, truth), "file_name"
    try:
        return np.array([place[entry[key]] for entry in entries], np.int64)
    except (KeyError, TypeError):
        unknown = [entry[key] for entry in entries if not _has(place, entry[key])]
        raise ConfigError(
            f"{where}: {len(unknown):,} of {len(entries):,} detections are of images that "
            f"{truth.name} does not have, such as {unknown[0]!r:.80}: are these the predictions of "
            "another dataset?"
        ) from None


def _match_files(files: set[str], truth: GroundTruth) -> dict[Any, int]:
    """The image of each file that the dataset has: by its path, the end of it, or its name.

    A name alone may be that of another image, so a warning says so.
    """
    whole = {os.path.realpath(truth.path(i)): i for i in range(len(truth.image_ids))}
    relative = {os.path.normpath(name): i for i, name in enumerate(truth.file_names) if name}
    last: dict[str, int | None] = {}
    for i, name in enumerate(truth.file_names):
        base = os.path.basename(name)
        last[base] = None if base in last else i  # two images have the name
    found: dict[Any, int] = {}
    by_name = []
    for file in sorted(files):
        *folders, base = PurePath(os.path.normpath(file)).parts or ("",)
        ends = (os.path.join(*folders[k:], base) for k in range(len(folders)))
        image = whole.get(os.path.realpath(file))
        if image is None:
            image = next((relative[end] for end in ends if end in relative), None)
        if image is None:
            image = relative.get(base, last.get(base))
            by_name += [(file, truth.file_names[image])] if image is not None else []
        if image is not None:
            found[file] = image
    if by_name:
        logger.warning(
            "%d files are taken for images of %s by their name alone, such as %s for %s",
            len(by_name),
            truth.name,
            *by_name[0],
        )
    return found


def _has(place: dict[Any, int], key: Any) -> bool:
    try:
        return key in place
    except TypeError:  # a list
        return False
