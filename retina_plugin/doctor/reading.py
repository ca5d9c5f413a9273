"""Annotation files in COCO's format, read with an error that names the file and the place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from retina_plugin.errors import ConfigError
from retina_plugin.evaluation.detections import orjson

__all__ = ["category_names", "image_files", "read_annotations", "read_json"]


def read_annotations(path: str | os.PathLike) -> dict[str, Any]:
    """The content of an annotation file in COCO's format.

    Raises:
        ConfigError: see :func:`read_json`; or it is not a JSON object.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: holds a {type(content).__name__}, not an object with images, annotations and "
            "categories: name an annotation file in COCO's format"
        )
    return content


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file.

    UTF-8, with or without a byte-order mark, UTF-16 and UTF-32 are read.

    Raises:
        ConfigError: it cannot be read, is empty, cut or not JSON; the line has the file, the place
            and the fix.
    """
    fix = "write or copy it again"
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    encoding = json.detect_encoding(data)
    if not data.strip(b"\xef\xbb\xbf \t\r\n\0"):
        raise ConfigError(f"{path}: is empty: {fix}")
    content = None
    if orjson is not None and encoding == "utf-8":
        try:
            content = orjson.loads(data)
        except orjson.JSONDecodeError:
            content = None  # it has NaN, or it is no JSON: Python's reader decides
    return _parse(path, data, encoding, fix) if content is None else content


def _parse(path: str | os.PathLike, data: bytes, encoding: str, fix: str) -> Any:
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}: is not {encoding.upper()}: byte 0x{data[error.start]:02x} in line {line} "
            f"(byte {error.start}): save it as UTF-8"
        ) from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        cut = "" if text.rstrip()[-1:] in ("}", "]") else "it ends in the middle, "
        raise ConfigError(
            f"{path}: is not JSON: {cut}{error.msg} in line {error.lineno}, column {error.colno}: "
            f"{fix}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number too long, nested too deeply
        raise ConfigError(f"{path}: is not JSON: {error}: {fix}") from None


def category_names(content: dict[str, Any]) -> list[str]:
    """The names of the classes in the order in which Detectron2 numbers them: by id."""
    try:
        categories = sorted(content["categories"], key=lambda c: c["id"])
        return [str(category["name"]) for category in categories]
    except (KeyError, TypeError):
        return []


def image_files(content: dict[str, Any]) -> list[str]:
    """The file names of the images that have one."""
    images = content.get("images")
    if not isinstance(images, list):
        return []
    found = [image.get("file_name") for image in images if isinstance(image, dict)]
    return [name for name in found if isinstance(name, str)]
