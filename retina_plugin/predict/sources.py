"""Where images come from: files, folders, videos, webcams."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from retina_plugin.data.images import image_suffixes
from retina_plugin.errors import ConfigError, one_line

from .images import as_bgr

__all__ = ["Frame", "OnError", "describe", "find_inputs", "is_video", "list_folder", "read_frames"]

# What to do with a source that cannot be used: it is called with the source and the error.
OnError = Callable[[Any, Exception], None]

_VIDEOS = {
    *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv"),
    *(".ts", ".mts", ".m2ts", ".3gp"),  # of cameras and phones
}


@dataclass(frozen=True, eq=False)
class Frame:
    """An image on its way to the network.

    Args:
        pixels: (H, W, 3) uint8 BGR.
        path: the file that it is from, if any.
        number: of a video's frame, from 0.
        seconds: of a video's frame, from the beginning.
    """

    pixels: np.ndarray
    path: str | None = None
    number: int | None = None
    seconds: float | None = None


def is_video(path: str | os.PathLike) -> bool:
    """Whether a file's name says that it is a video."""
    return os.path.splitext(os.fspath(path))[1].lower() in _VIDEOS


def list_folder(folder: str | os.PathLike[str], *, videos: bool = False) -> list[str]:
    """Paths of the images of a folder, by name; not of its folders, and no hidden files.

    Args:
        videos: also those of videos.
    """
    images = image_suffixes()
    known = images | _VIDEOS if videos else images - _VIDEOS  # Pillow opens .mpg, but no frame
    try:
        with os.scandir(os.fspath(folder)) as entries:
            names = sorted(
                entry.name
                for entry in entries
                if os.path.splitext(entry.name)[1].lower() in known
                and not entry.name.startswith(".")
                and not entry.is_dir()
            )
    except OSError as error:
        raise ConfigError(f"cannot read the folder {folder}: {error.strerror or error}") from None
    return [os.path.join(folder, name) for name in names]


def find_inputs(
    inputs: Iterable[str], on_error: OnError, *, not_in: Iterable[str | os.PathLike[str]] = ()
) -> list[str | int]:
    """Files and webcams that a command's inputs stand for, each once.

    Args:
        inputs: files, folders, patterns such as ``photos/**/*.jpg``, or numbers of webcams. What
            exists under the very name is never taken for a pattern or a number.
        on_error: is called with what stands for nothing.
        not_in: folders in which patterns find nothing, such as the output of an earlier run.
    """
    found: dict[str | int, str | int] = {}
    excluded = {os.path.realpath(folder) for folder in not_in}

    def add(files: Iterable[str]) -> None:
        for file in files:  # a.jpg and ./a.jpg are one
            found.setdefault(file if "://" in file else os.path.abspath(file), file)

    for name in inputs:
        path = os.path.expanduser(name)
        if os.path.isdir(path):
            files = list_folder(path, videos=True)
            if not files:
                on_error(name, ConfigError("the folder has no images or videos"))
            add(files)
        elif os.path.exists(path) or "://" in path:
            add([path])
        elif name.isascii() and name.isdecimal():
            found[int(name)] = int(name)
        elif glob.has_magic(path):
            matches = sorted(
                match
                for match in glob.iglob(path, recursive=True)
                if not os.path.isdir(match)
                and os.path.realpath(os.path.dirname(match)) not in excluded
            )
            if not matches:
                on_error(name, ConfigError("no file matches this pattern"))
            add(matches)
        else:
            on_error(name, ConfigError("there is no such file or folder"))
    return list(found.values())


def read_frames(sources: Iterable[Any], on_error: OnError | None = None) -> Iterator[Frame]:
    """Frames of images in any form, one after the other.

    Args:
        on_error: for images that cannot be used, which are then left out. None: raise the error.
    """
    for source in sources:
        try:
            pixels = as_bgr(source)
        except ConfigError as error:
            if on_error is None:
                raise
            on_error(source, error)
            continue
        path = os.fspath(source) if isinstance(source, (str, os.PathLike)) else None
        yield Frame(pixels, path)


def describe(source: Any) -> str:
    """A source in a message."""
    if isinstance(source, Frame):
        source = source.path
    return one_line(str(source)) if isinstance(source, (str, int, os.PathLike)) else "an image"
