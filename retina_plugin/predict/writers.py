"""Files that ``retina predict`` writes while it runs. Each is whole, or is not there."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np

from retina_plugin.errors import ConfigError

from .predictions import Predictions

__all__ = ["CsvFile", "FileNames", "ImageIds", "JsonList", "write_image"]

_IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}  # formats that drawn images keep
_MAX_SIDES = {".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383}  # pixels; others have no such limit
# File systems have names of 255 bytes: this leaves room for a number, an extension and ".partial".
_MAX_STEM = 230
# Of a name that the file system cannot have, and of no other file there.
_NAME_ERRORS = {errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL}
_FIELDS = "image_id file_name frame x0 y0 x1 y1 score class_id category_id class_name".split()


class _Stream:
    """A text file that appears under its name when it is closed.

    After an error what was written stays under a hidden name, ``.NAME.partial``.
    """

    _end = ""  # of the text

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        # backslashreplace: a file name may hold bytes that are no UTF-8
        self._file: IO[str] = open(  # noqa: SIM115
            self._partial, "w", encoding="utf-8", errors="backslashreplace", newline=""
        )

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(OSError):  # the error may be a full disk
            self._finish()

    def close(self) -> None:
        self._finish()
        self._partial.replace(self._path)

    def _finish(self) -> None:
        with self._file:
            self._file.write(self._end)
            self._file.flush()
            os.fsync(self._file.fileno())


class JsonList(_Stream):
    """A JSON list, one entry a line, which grows on the disk and not in memory."""

    _end = "\n]\n"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file.write("[")
        self._separator = "\n"

    def write(self, entries: Iterable[dict[str, Any]]) -> None:
        for entry in entries:
            self._file.write(f"{self._separator}{json.dumps(entry)}")
            self._separator = ",\n"


class CsvFile(_Stream):
    """A table of detections: corners in pixels, one detection a line."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._writer = csv.writer(self._file)
        self._writer.writerow(_FIELDS)

    def write(self, found: Predictions, entries: Iterable[dict[str, Any]]) -> None:
        """The detections of an image, with their entries of :meth:`Predictions.to_coco`."""
        for box, k, entry in zip(found.boxes.tolist(), found.class_ids.tolist(), entries):
            head = [entry["image_id"], entry.get("file_name", ""), entry.get("frame", "")]
            tail = [entry["score"], k, entry["category_id"], entry["category_name"]]
            self._writer.writerow([*head, *box, *tail])


class ImageIds:
    """An ``image_id`` for each image, no two of them the same.

    A name that is a number, as in COCO (000000000139.jpg), is its own id. Other images get the
    next number from 1 on, and so does a second image with the same number.

    Args:
        files: that are to come: no other image gets the numbers of their names.
    """

    def __init__(self, files: Iterable[str] = ()) -> None:
        self._kept = {number for number in map(_number, files) if number is not None}
        self._from_names: set[int] = set()
        self._next = 1

    def of(self, path: str | None) -> int:
        number = _number(path or "")
        if (
            number is not None
            and number not in self._from_names
            and (number in self._kept or not 1 <= number < self._next)
        ):
            self._from_names.add(number)
            return number
        while self._next in self._from_names or self._next in self._kept:
            self._next += 1
        self._next += 1
        return self._next - 1


def _number(path: str) -> int | None:
    """The number that a file's name is, if it is one."""
    stem = Path(path).stem
    is_number = stem.isascii() and stem.isdecimal() and len(stem) <= 18
    return int(stem) if is_number else None


class FileNames:
    """Output names, no two of them the same on any file system.

    A second ``a.jpg``, of another folder, becomes ``a_2.jpg``. Very long names are shortened.
    """

    def __init__(self) -> None:
        self._next: dict[str, int] = {}  # of each name, in lower case: the next number to try

    def new(self, path: str, extensions: set[str], default: str) -> str:
        """The base name of ``path``, with the extension ``default`` if its own is none of these."""
        stem, extension = os.path.splitext(os.path.basename(path))
        extension = extension if extension.lower() in extensions else default
        stem = _shortened(stem)
        first = f"{stem}{extension}".lower()
        number = self._next.get(first, 1)
        name = f"{stem}{extension}" if number == 1 else f"{stem}_{number}{extension}"
        while name.lower() in self._next:
            number += 1
            name = f"{stem}_{number}{extension}"
        self._next[name.lower()] = 2
        self._next[first] = number + 1
        return name

    def image(self, path: str, size: tuple[int, int]) -> str:
        """A name for a drawn image.

        Formats that OpenCV does not write become JPEG; above JPEG's largest side they become PNG.

        Args:
            size: height and width.
        """
        allowed = {e for e in _IMAGES if max(size) <= _MAX_SIDES.get(e, max(size))}
        return self.new(path, allowed, ".jpg" if ".jpg" in allowed else ".png")

    def video(self, path: str) -> str:
        """A name for a drawn video."""
        return self.new(path, {".mp4"}, ".mp4")


def _shortened(stem: str) -> str:
    while len(os.fsencode(stem)) > _MAX_STEM:
        stem = stem[:-1]
    return stem


def write_image(path: Path, image: np.ndarray) -> None:
    """Write an image whole or not at all.

    Raises:
        ConfigError: OpenCV cannot encode this image, or the file system cannot have its name.
        OSError: the folder or the disk cannot be written to.
    """
    try:
        encoded, data = cv2.imencode(path.suffix.lower(), image)
    except cv2.error:
        encoded = False
    if not encoded:
        height, width = image.shape[:2]
        raise ConfigError(f"OpenCV cannot encode {width}x{height} pixels as {path.suffix}")
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data.tobytes())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if error.errno not in _NAME_ERRORS:
            raise
        raise ConfigError(f"cannot write {path} ({error.strerror})") from None
