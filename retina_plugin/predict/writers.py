"""Files that ``retina predict`` writes while it runs. Each is whole, or is not there."""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np

from .predictions import Predictions

__all__ = ["CsvFile", "FileNames", "ImageIds", "JsonList", "write_image"]

_IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}  # formats that drawn images keep
_FIELDS = "image_id file_name frame x0 y0 x1 y1 score class_id category_id class_name".split()


class _Stream:
    """A text file that appears under its name when it is closed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._file: IO[str] = open(  # noqa: SIM115
            self._partial, "w", encoding="utf-8", newline=""
        )

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(self._path)


class JsonList(_Stream):
    """A JSON list, one entry a line, which grows on the disk and not in memory."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file.write("[")
        self._separator = "\n"

    def write(self, entries: Iterable[dict[str, Any]]) -> None:
        for entry in entries:
            self._file.write(f"{self._separator}{json.dumps(entry)}")
            self._separator = ",\n"

    def close(self) -> None:
        self._file.write("\n]\n")
        super().close()


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
    """

    def __init__(self) -> None:
        self._from_names: set[int] = set()
        self._next = 1

    def of(self, path: str | None) -> int:
        stem = Path(path or "").stem
        if stem.isascii() and stem.isdecimal() and len(stem) <= 18:
            number = int(stem)
            if number not in self._from_names and not 1 <= number < self._next:
                self._from_names.add(number)
                return number
        while self._next in self._from_names:
            self._next += 1
        self._next += 1
        return self._next - 1


class FileNames:
    """Output names, no two of them the same on any file system.

    A second ``a.jpg``, of another folder, becomes ``a_2.jpg``.
    """

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def new(self, path: str, extensions: set[str], default: str) -> str:
        """The base name of ``path``, with the extension ``default`` if its own is none of these."""
        stem, extension = os.path.splitext(os.path.basename(path))
        extension = extension if extension.lower() in extensions else default
        for number in itertools.count(1):
            name = f"{stem}{extension}" if number == 1 else f"{stem}_{number}{extension}"
            if name.lower() not in self._taken:
                self._taken.add(name.lower())
                return name
        raise AssertionError("unreachable")

    def image(self, path: str) -> str:
        """A name for a drawn image; formats that OpenCV does not write become JPEG."""
        return self.new(path, _IMAGES, ".jpg")

    def video(self, path: str) -> str:
        """A name for a drawn video."""
        return self.new(path, {".mp4"}, ".mp4")


def write_image(path: Path, image: np.ndarray) -> None:
    """Write an image whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    encoded, data = cv2.imencode(path.suffix.lower(), image)
    if not encoded:
        raise OSError(f"OpenCV cannot encode {path}")
    partial = path.with_name(f".{path.name}.partial"[-255:])
    partial.write_bytes(data.tobytes())
    partial.replace(path)
