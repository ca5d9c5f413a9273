"""CSV: a line for each box, with a header, or as keras-retinanet reads it.

Columns are found by their names, in any order and case:

- the image: one of ``COLUMNS["image"]``, relative to the folder that is named, or to the file's;
- the class: one of ``COLUMNS["class"]``;
- the box in pixels from 0: two corners (xmin, ymin, xmax, ymax; x1, y1, x2, y2; ...), or a corner
  and the size (x, y, w, h);
- ``width`` and ``height`` are the image's, as TensorFlow's converters write them. Without them they
  are read from the image.

Without a header a line is ``path,x1,y1,x2,y2,class``. That is assumed if the first line has six
values of which the middle four are numbers, or are empty. A line without box and class is an image
without objects.

Classes are those of ``labels.txt`` or of keras-retinanet's ``classes.csv`` beside the file, or else
of all CSV files of the folder that have the same columns, sorted: so train.csv and val.csv number
them alike.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from retina_plugin.errors import ConfigError, did_you_mean

from .content import (
    Box,
    Content,
    Source,
    find_image,
    image_size,
    list_files,
    read_labels,
    read_text,
    sort_classes,
    to_number,
)
from .spec import Spec

__all__ = ["COLUMNS", "find"]

# What a column holds -> its names.
COLUMNS = {
    "image": ("filename", "file_name", "image", "image_path", "path", "file", "image_name"),
    "class": ("class", "label", "class_name", "category", "label_name", "name"),
    "x1": ("xmin", "x1", "x_min", "left"),
    "y1": ("ymin", "y1", "y_min", "top"),
    "x2": ("xmax", "x2", "x_max", "right"),
    "y2": ("ymax", "y2", "y_max", "bottom"),
    "x": ("x", "bbox_x"),
    "y": ("y", "bbox_y"),
    "w": ("w", "bbox_width", "bbox_w"),
    "h": ("h", "bbox_height", "bbox_h"),
    "width": ("width", "image_width", "img_width"),
    "height": ("height", "image_height", "img_height"),
}

_HEADERLESS = ("image", "x1", "y1", "x2", "y2", "class")
_BOXES = (("x1", "y1", "x2", "y2"), ("x", "y", "w", "h"))


class _Row(NamedTuple):
    where: str  # file and line
    values: dict[str, str]  # what a column holds -> text, stripped


class _Table(NamedTuple):
    columns: dict[str, int]  # what a column holds -> its place
    rows: list[_Row]


def find(spec: Spec) -> Source:
    """The files of a table.

    Raises:
        ConfigError: it cannot be read, or has no column for something.
    """
    table = _read(spec.path)
    folder = os.path.dirname(spec.path)
    root = spec.rest or folder
    if not os.path.isdir(root):
        raise ConfigError(f"{spec.path}: there is no folder of images {root}")
    images = {_image(row, root) for row in table.rows}
    beside = list_files(folder, {".csv"}) if folder else []
    beside = [path for path in beside if os.path.dirname(path) == folder]
    files = [spec.path, *beside, os.path.join(folder, "labels.txt"), *sorted(images)]
    return Source(files, lambda: _convert(spec.path, table, root, beside))


def _image(row: _Row, root: str) -> str:
    return find_image(root, row.values["image"], ())


def _convert(path: str, table: _Table, root: str, beside: list[str]) -> tuple[dict[str, Any], str]:
    classes = _classes(path, table, beside)
    numbers = {name: k for k, name in enumerate(classes)}
    content = Content(classes)
    for row in table.rows:
        image = _image(row, root)
        if image not in content.images:
            content.images[image] = (_size(row) or image_size(image, row.where), [])
        found = _box(row)
        if found is None:
            continue
        name = row.values["class"]
        if name not in numbers:
            raise ConfigError(
                f"{row.where}: the class '{name}' is not in labels.txt or classes.csv"
                f"{did_you_mean(name, classes)}"
            )
        content.images[image][1].append(Box(numbers[name], *found))
    return content.to_coco(root)


def _size(row: _Row) -> tuple[int, int] | None:
    sides = [to_number(row.values.get(key, "")) for key in ("width", "height")]
    width, height = (int(side) if side is not None and side >= 1 else 0 for side in sides)
    return (width, height) if width and height else None


def _box(row: _Row) -> tuple[float, float, float, float] | None:
    """x, y, width and height; None if the image has no objects."""
    keys = next(keys for keys in _BOXES if row.values.keys() >= {*keys})
    texts = [row.values[key] for key in keys]
    if not any([*texts, row.values["class"]]):
        return None
    if not row.values["class"]:
        raise ConfigError(f"{row.where}: the box has no class")
    numbers = [to_number(text) for text in texts]
    for key, text, number in zip(keys, texts, numbers):
        if number is None:
            raise ConfigError(f"{row.where}: {key} is '{text}', which is no number")
    a, b, c, d = (number for number in numbers if number is not None)
    width, height = (c - a, d - b) if keys == _BOXES[0] else (c, d)
    if width < 0 or height < 0:
        raise ConfigError(f"{row.where}: the box {', '.join(texts)} has a negative width or height")
    return a, b, width, height


def _classes(path: str, table: _Table, beside: list[str]) -> list[str]:
    folder = os.path.dirname(path)
    labels = read_labels(folder) or _read_classes_csv(os.path.join(folder, "classes.csv"))
    if labels:
        return labels
    names = {row.values["class"] for row in table.rows}
    for other in beside:
        if other != path:
            try:
                found = _read(other)
            except ConfigError:
                continue  # a table of something else
            if found.columns == table.columns:
                names |= {row.values["class"] for row in found.rows}
    names.discard("")
    if not names:
        raise ConfigError(f"{path}: has no boxes: name the classes in a labels.txt beside it")
    return sort_classes(names)


def _read_classes_csv(path: str) -> list[str] | None:
    """keras-retinanet's list: ``name,number`` in each line; None if there is no such file."""
    if not os.path.isfile(path):
        return None
    names: dict[int, str] = {}
    for number, cells in _cells(path):
        if len(cells) != 2 or not cells[1].isdecimal() or int(cells[1]) in names:
            raise ConfigError(f"{path}, line {number}: write a class and its number: car,0")
        names[int(cells[1])] = cells[0]
    if sorted(names) != list(range(len(names))) or len({*names.values()}) != len(names):
        raise ConfigError(f"{path}: number different classes from 0 to {len(names) - 1}")
    return [names[k] for k in range(len(names))]


def _read(path: str) -> _Table:
    lines = list(_cells(path))
    if not lines:
        raise ConfigError(f"{path}: is empty")
    columns, body = _find_columns(path, lines[0][1]), lines[1:]
    if columns is None:
        columns, body = {key: i for i, key in enumerate(_HEADERLESS)}, lines
    rows = []
    for number, cells in body:
        if len(cells) <= max(columns.values()):
            raise ConfigError(
                f"{path}, line {number}: has {len(cells)} values, but there are "
                f"{max(columns.values()) + 1} columns"
            )
        values = {key: cells[i] for key, i in columns.items()}
        if not values["image"]:
            raise ConfigError(f"{path}, line {number}: names no image")
        rows.append(_Row(f"{path}, line {number}", values))
    if not rows:
        raise ConfigError(f"{path}: has no line below its header")
    return _Table(columns, rows)


def _cells(path: str) -> Iterator[tuple[int, list[str]]]:
    """The number and the stripped cells of each line that is not blank."""
    lines = read_text(path).splitlines(keepends=True)
    first = next((line for line in lines if line.strip()), "")
    # Spreadsheets write semicolons where the comma is the decimal sign.
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(lines, delimiter=delimiter)
    try:
        for cells in reader:
            stripped = [cell.strip() for cell in cells]
            if any(stripped):
                yield reader.line_num, stripped
    except csv.Error as error:
        raise ConfigError(f"{path}, line {reader.line_num}: is not CSV: {error}") from None


def _find_columns(path: str, header: list[str]) -> dict[str, int] | None:
    """Where each column is; None if there is no header."""
    if len(header) == len(_HEADERLESS):
        middle = header[1:5]
        if all(to_number(text) is not None for text in middle) or not any(middle):
            return None
    found: dict[str, int] = {}
    for i, text in enumerate(header):
        for key, names in COLUMNS.items():
            if text.lower() in names:
                if key in found:
                    raise ConfigError(
                        f"{path}: the columns '{header[found[key]]}' and '{text}' both name the "
                        f"{key}: keep one"
                    )
                found[key] = i
    needed = ["image", "class"]
    if not any(found.keys() >= {*keys} for keys in _BOXES):
        needed += _BOXES[1] if {"w", "h"} & found.keys() else _BOXES[0]
    for key in needed:
        if key not in found:
            raise ConfigError(
                f"{path}: has no column for {key}, which is called {' or '.join(COLUMNS[key])}; "
                f"its columns: {', '.join(header)[:200]}"
            )
    return found
