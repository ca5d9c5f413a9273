"""What every format is turned into: the content of an annotation file in COCO's format."""

from __future__ import annotations

import codecs
import math
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from PIL import ExifTags, Image

from retina_plugin.errors import ConfigError

__all__ = [
    "Box",
    "Content",
    "Source",
    "find_image",
    "image_size",
    "list_files",
    "read_labels",
    "read_text",
    "sort_classes",
    "to_number",
]


class Box(NamedTuple):
    """An object: class in [0, K), left upper corner and size in pixels."""

    category: int
    x: float
    y: float
    width: float
    height: float
    is_crowd: bool = False


@dataclass
class Content:
    """Images with their boxes.

    Args:
        classes: names of the K classes, in the order of their numbers.
        images: path -> width and height in pixels, and boxes.
    """

    classes: Sequence[str]
    images: dict[str, tuple[tuple[int, int], list[Box]]] = field(default_factory=dict)

    def to_coco(self, root: str) -> tuple[dict[str, Any], str]:
        """The content of the file, and the folder that its file names are relative to.

        Images are numbered in the order of their paths, whatever order the source has them in.

        Args:
            root: that folder, if all images are in it. Else it is the one that all have in common.
        """
        paths = sorted(self.images)
        if not all(path.startswith(os.path.join(root, "")) for path in paths):
            root = os.path.commonpath([os.path.dirname(path) for path in paths])
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image_id, path in enumerate(paths, start=1):
            (width, height), boxes = self.images[path]
            name = path[len(os.path.join(root, "")) :]
            images.append({"id": image_id, "file_name": name, "width": width, "height": height})
            for box in boxes:
                annotations.append(
                    {
                        "id": len(annotations) + 1,  # not 0: pycocotools reads it as "no match"
                        "image_id": image_id,
                        "category_id": box.category + 1,
                        "bbox": [box.x, box.y, box.width, box.height],
                        "area": box.width * box.height,
                        "iscrowd": int(box.is_crowd),
                    }
                )
        categories = [{"id": k + 1, "name": name} for k, name in enumerate(self.classes)]
        return {"images": images, "annotations": annotations, "categories": categories}, root


class Source(NamedTuple):
    """A dataset in another format.

    Args:
        files: everything that it is read from. It is converted again when one of them changes.
        convert: reads it, and returns what :meth:`Content.to_coco` does.
    """

    files: list[str]
    convert: Callable[[], tuple[dict[str, Any], str]]


def list_files(folder: str, suffixes: Collection[str]) -> list[str]:
    """Paths of the files of a folder and its folders, sorted; no hidden ones.

    Args:
        suffixes: in lower case, e.g. {".xml"}. Files may have them in upper case.

    Raises:
        ConfigError: a folder cannot be read.
    """
    found: list[str] = []
    todo, seen = [folder], set()
    while todo:
        current = todo.pop()
        try:
            status = os.stat(current)
            if (status.st_dev, status.st_ino) in seen:  # a link to a folder above
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(current) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        todo.append(entry.path)
                    elif os.path.splitext(entry.name)[1].lower() in suffixes:
                        found.append(entry.path)
        except OSError as error:
            raise ConfigError(f"{current}: cannot be read: {error.strerror}") from None
    return sorted(found)


def find_image(folder: str, name: str, images: Collection[str]) -> str:
    """The path of an image that an annotation names; it need not be there.

    Args:
        folder: that the name is relative to.
        name: as it was written, perhaps on Windows.
        images: paths that are there.
    """
    path = os.path.normpath(os.path.join(folder, name))
    if path not in images and "\\" in name:
        other = os.path.normpath(os.path.join(folder, name.replace("\\", "/")))
        return path if os.path.exists(path) else other
    return path


def image_size(path: str, where: str) -> tuple[int, int]:
    """Width and height of an image as a training reads it: upright. No pixel is decoded.

    Args:
        where: the file and line that name the image, for the error.

    Raises:
        ConfigError: it is not there, or is no image.
    """
    try:
        with Image.open(path) as header:
            width, height = header.size
            orientation = header.getexif().get(ExifTags.Base.Orientation, 1)
    except FileNotFoundError:
        raise ConfigError(f"{where}: there is no image {path}") from None
    except Exception as error:  # Pillow raises many kinds of errors for a broken file
        what = error.strerror if isinstance(error, OSError) and error.strerror else "it is no image"
        raise ConfigError(f"{where}: cannot read the image {path}: {what}") from None
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


def read_text(path: str) -> str:
    """The text of a file in UTF-8, with or without a byte-order mark, or in UTF-16 with one.

    Raises:
        ConfigError: it cannot be read, or has another encoding.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        return data.decode("utf-16" if data.startswith(marks) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}, line {line}: is not UTF-8 (byte 0x{data[error.start]:02x}): save it as UTF-8"
        ) from None


def to_number(text: str) -> float | None:
    """A finite number; None if the text is none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def sort_classes(names: Iterable[str]) -> list[str]:
    """Names in alphabetical order; numbers by their value."""
    names = set(names)
    if all(name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def read_labels(folder: str) -> list[str] | None:
    """The names in ``labels.txt``, one a line; None if the folder has no such file.

    Raises:
        ConfigError: it is empty, or has a name twice.
    """
    path = os.path.join(folder, "labels.txt")
    if not os.path.isfile(path):
        return None
    lines = [line.strip() for line in read_text(path).splitlines()]
    names = [line for line in lines if line]
    if not names:
        raise ConfigError(f"{path}: has no names: write a class in each line, or remove the file")
    for name in names:
        if names.count(name) > 1:
            line = len(lines) - lines[::-1].index(name)
            raise ConfigError(f"{path}, line {line}: the class '{name}' is there twice")
    return names
