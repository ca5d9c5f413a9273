"""Annotation files with a byte-order mark, which pycocotools refuses."""

from __future__ import annotations

import builtins
import json
from typing import IO, Any

import pycocotools.coco

__all__ = ["extend_pycocotools"]


def extend_pycocotools() -> None:
    """Make pycocotools, through which Detectron2 reads annotations, read every encoding of JSON.

    It opens a file in the locale's encoding, and stops at the mark that some programs write in
    front of UTF-8. There is no argument for it, so its ``open`` is replaced.
    """
    pycocotools.coco.open = _open


def _open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> IO[Any]:
    if mode == "r" and not args and "encoding" not in kwargs:
        with builtins.open(file, "rb") as start:
            kwargs["encoding"] = json.detect_encoding(start.read(4))
    return builtins.open(file, mode, *args, **kwargs)
