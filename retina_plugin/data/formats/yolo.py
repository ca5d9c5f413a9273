"""YOLO in Ultralytics' layout: ``data.yaml`` with classes, folders of images, and labels beside.

- ``path``, ``train``, ``val`` and ``test`` are read as Ultralytics reads them: a folder, a ``.txt``
  list of images, or a list of these. Paths are relative to ``path``, and that to ``data.yaml``.
- **Labels** of ``images/train/a.jpg`` are in ``labels/train/a.txt``; without a folder ``images`` in
  the path, beside the image. An image without that file has no objects.
- **Boxes** are shares of the image as a training reads it, upright by its EXIF orientation.
- A line with more numbers is a polygon (segments, oriented boxes): its extent is the box. With
  ``kpt_shape`` the rest are keypoints, which are left out.

Peer: ``ultralytics.data.utils``. It leaves out images with a fault in their labels; here that is an
error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import yaml

from retina_plugin.errors import ConfigError, check_choice

from ..images import image_suffixes
from .content import Box, Content, Source, find_image, image_size, list_files, read_text, to_number
from .spec import Spec

__all__ = ["find"]

_SPLITS = ("train", "val", "test")
_FARTHEST = 2.0  # a share of the image; a label in pixels is above it


def find(spec: Spec) -> Source:
    """The files of a split. Without one, it is ``train``.

    Raises:
        ConfigError: ``data.yaml`` cannot be read, or has no such split or no images for it.
    """
    path = os.path.join(spec.path, "data.yaml") if os.path.isdir(spec.path) else spec.path
    settings = _read_settings(path)
    split = spec.rest or "train"
    check_choice(f"{path}: split", split, [key for key in _SPLITS if settings.get(key)])
    classes = _classes(path, settings)
    root = _root(path, settings)
    images: dict[str, str] = {}  # path -> where it is named
    lists: list[str] = []
    entries = settings[split]
    for entry in entries if isinstance(entries, list) else [entries]:
        place = _place(path, split, root, entry)
        if os.path.isdir(place):
            images.update(dict.fromkeys(list_files(place, image_suffixes()), path))
        else:
            lists.append(place)
            images.update(_listed(place, root))
    if not images:
        raise ConfigError(f"{path}: {split} has no images: {entries}")
    labels = {image: _label_file(image) for image in images}
    points = "kpt_shape" in settings
    return Source(
        [path, *lists, *images, *labels.values()],
        lambda: _convert(path, classes, images, labels, points),
    )


def _read_settings(path: str) -> dict[str, Any]:
    text = read_text(path)
    try:
        # All values as text: to YAML a class named "no" would be False.
        settings = yaml.load(text, yaml.BaseLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or "it cannot be read"
        raise ConfigError(f"{path}{line}: is not YAML: {what}") from None
    if not isinstance(settings, dict) or not {"names", "nc"} & settings.keys():
        raise ConfigError(f"{path}: has no names: name the data.yaml of a YOLO dataset")
    return settings


def _classes(path: str, settings: dict[str, Any]) -> list[str]:
    names, count = settings.get("names"), settings.get("nc")
    if not names and isinstance(count, str) and count.isdecimal():
        return [f"class_{k}" for k in range(int(count))]  # Ultralytics' names for them
    if isinstance(names, dict):
        order = {str(k): k for k in range(len(names))}
        if names.keys() != order.keys():
            raise ConfigError(
                f"{path}: names must number the classes from 0 to {len(names) - 1}, got "
                f"{', '.join(map(str, names))[:100]}"
            )
        names = [names[str(k)] for k in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(x, str) for x in names):
        raise ConfigError(f"{path}: names must be a list of class names")
    if count and count != str(len(names)):
        raise ConfigError(f"{path}: nc is {count}, but there are {len(names)} names")
    return names


def _root(path: str, settings: dict[str, Any]) -> str:
    """The folder that the splits are relative to."""
    own = os.path.dirname(path)
    root = os.path.expanduser(str(settings.get("path") or ""))
    if os.path.isdir(os.path.join(own, root)):
        return os.path.normpath(os.path.join(own, root))
    return os.path.abspath(root)  # as from the folder that the command runs in


def _place(path: str, split: str, root: str, entry: Any) -> str:
    """The folder or list that an entry of a split names."""
    entry = os.path.expanduser(str(entry))
    place = os.path.normpath(os.path.join(root, entry))
    if not os.path.exists(place) and entry.startswith("../"):  # as Roboflow writes it
        place = os.path.normpath(os.path.join(root, entry[3:]))
    if not os.path.exists(place):
        raise ConfigError(f"{path}: {split}: there is no {os.path.join(root, entry)}")
    return place


def _listed(path: str, root: str) -> Iterator[tuple[str, str]]:
    """The images of a list, each with its line."""
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        name = line.strip()
        if not name:
            continue
        beside = find_image(os.path.dirname(path), name, ())
        found = beside if os.path.exists(beside) else find_image(root, name, ())
        yield found, f"{path}, line {number}"


def _label_file(image: str) -> str:
    """Ultralytics' rule: the last folder ``images`` of the path becomes ``labels``."""
    before, folder, after = os.path.splitext(image)[0].rpartition(f"{os.sep}images{os.sep}")
    if not folder:
        return f"{after}.txt"
    return f"{before}{os.sep}labels{os.sep}{after}.txt"


def _convert(
    path: str, classes: list[str], images: dict[str, str], labels: dict[str, str], points: bool
) -> tuple[dict[str, Any], str]:
    content = Content(classes)
    labelled = False
    for image, where in images.items():
        size = image_size(image, where)
        boxes: list[Box] = []
        if os.path.isfile(labels[image]):
            labelled = True
            boxes = list(_read_labels(labels[image], size, classes, points))
        content.images[image] = (size, boxes)
    if not labelled:
        image, label = next(iter(labels.items()))
        raise ConfigError(f"{path}: no image has labels: those of {image} belong to {label}")
    return content.to_coco(os.path.commonpath([os.path.dirname(image) for image in images]))


def _read_labels(
    path: str, size: tuple[int, int], classes: list[str], points: bool
) -> Iterator[Box]:
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        where = f"{path}, line {number}"
        values = [to_number(text) for text in fields]
        for text, value in zip(fields, values):
            if value is None:
                raise ConfigError(f"{where}: '{text}' is no number")
        category, *shares = (value for value in values if value is not None)
        if category != int(category) or not 0 <= category < len(classes):
            raise ConfigError(
                f"{where}: class {fields[0]} is not one of 0 to {len(classes) - 1}, the "
                f"{len(classes)} names of data.yaml"
            )
        box = _box(shares, points)
        if box is None:
            raise ConfigError(
                f"{where}: {len(fields)} numbers are neither a box (class, x, y, width, height) "
                "nor a polygon (class, x1, y1, x2, y2, x3, y3, ...)"
            )
        if not all(-_FARTHEST < value < _FARTHEST for value in box):
            raise ConfigError(
                f"{where}: the box lies far outside the image: YOLO's numbers are shares of its "
                "width and height, from 0 to 1"
            )
        if min(box[2:]) < 0:
            raise ConfigError(f"{where}: the box has a negative width or height")
        x, y, width, height = (share * side for share, side in zip(box, size * 2))
        yield Box(int(category), x, y, width, height)


def _box(shares: list[float], points: bool) -> tuple[float, float, float, float] | None:
    """Corner and size as shares of the image; None if they are neither a box nor a polygon."""
    if len(shares) == 4 or (points and len(shares) > 4):
        x, y, width, height = shares[:4]
        return x - width / 2, y - height / 2, width, height
    if len(shares) < 6 or len(shares) % 2:
        return None
    xs, ys = shares[::2], shares[1::2]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
