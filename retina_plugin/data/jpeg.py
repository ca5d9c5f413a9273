"""Decoding JPEGs with OpenCV, and hearing what libjpeg says of damaged ones."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from typing import IO

import cv2
import numpy as np

__all__ = ["decode_jpeg"]

# libjpeg has no other way to say that data are damaged than a line on the standard error.
_STDERR_LOCK = threading.Lock()
_EXTRA_BYTES = re.compile(rb"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9")
_DAMAGE = (b"Corrupt JPEG data", b"Premature end of JPEG file")
_LIBJPEG = (*_DAMAGE, b"Warning: unknown JFIF", b"Invalid SOS parameters", b"Inconsistent progr")


def decode_jpeg(data: bytes, flags: int) -> tuple[np.ndarray | None, str]:
    """The image as ``cv2.imdecode`` returns it, and libjpeg's line if data are damaged, else "".

    libjpeg's lines do not reach the standard error; those of other code do.
    """
    with _captured_stderr() as lines:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    damage = ""
    for line in lines:
        if not line.startswith(_LIBJPEG):
            os.write(2, line + b"\n")
        elif line.startswith(_DAMAGE) and not _is_padding(line, data):
            damage = line.decode(errors="replace").strip()
    return image, damage


def _is_padding(line: bytes, data: bytes) -> bool:
    """Whether libjpeg only means that bytes fill up the file behind all pixels."""
    extra = _EXTRA_BYTES.match(line)
    if extra is None:
        return False
    count, before_end_marker = int(extra[1]), data[:-2]
    return count <= 16 or len(before_end_marker) - len(before_end_marker.rstrip(b"\0\xff")) >= count


@contextlib.contextmanager
def _captured_stderr() -> Iterator[list[bytes]]:
    """The lines that C code writes to the standard error meanwhile, filled in at the end."""
    lines: list[bytes] = []
    with _STDERR_LOCK, contextlib.ExitStack() as stack:
        try:
            saved = os.dup(2)
        except OSError:  # the process has none
            yield lines
            return
        stack.callback(os.close, saved)
        if hasattr(os, "memfd_create"):  # Linux: a file in memory
            file: IO[bytes] = os.fdopen(os.memfd_create("stderr"), "rb")
        else:
            file = tempfile.TemporaryFile()  # noqa: SIM115
        stack.enter_context(file)
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(saved, 2)
            file.seek(0)
            lines += file.read().splitlines()
