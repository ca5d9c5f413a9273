"""Real images to compare and to calibrate exported models with."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence

import cv2
import numpy as np
from detectron2.data import DatasetCatalog

from retina_plugin.data import register_datasets
from retina_plugin.data.formats import similar_datasets
from retina_plugin.data.images import BadImageError, read_image
from retina_plugin.errors import ConfigError, first_line
from retina_plugin.predict.sources import find_inputs, is_video

__all__ = ["find_images", "image_files", "readable_images", "resized_batch"]


def find_images(sources: Sequence[str], image_format: str, count: int) -> list[np.ndarray]:
    """The first images of files, folders, patterns or datasets, as (H, W, 3) uint8.

    Args:
        sources: see :func:`image_files`.
        image_format: "BGR" or "RGB".
        count: at most.

    Raises:
        ConfigError: there is no image that can be read.
    """
    try:
        files = image_files(sources)
    except ConfigError as error:
        raise ConfigError(f"{error}: name a folder of images by --images") from None
    images = list(itertools.islice(readable_images(files, image_format), count))
    if not images:
        raise ConfigError(f"no image of {', '.join(sources)} can be read: name others by --images")
    return images


def image_files(sources: Sequence[str]) -> list[str]:
    """The image files of registered datasets, files, folders and patterns.

    A dataset whose files are not on this machine has none.

    Raises:
        ConfigError: a source is neither; no source has an image.
    """
    files: list[str] = []
    missing: list[str] = []
    for source in sources:
        register_datasets([source])
        if source in DatasetCatalog:
            try:
                records = DatasetCatalog.get(source)
            except Exception as error:  # the loader is the user's, too
                missing.append(f"{source} ({first_line(error)})")
                continue
            files += [record["file_name"] for record in records]
        elif os.path.exists(source) or any(sign in source for sign in "*?["):
            found = find_inputs([source], lambda path, error: None)
            files += [path for path in found if isinstance(path, str) and not is_video(path)]
        else:
            hint = similar_datasets(source)
            raise ConfigError(f"{source} is no image, folder or dataset{hint}")
    if not files:
        why = "; ".join(missing) or f"{', '.join(sources) or 'no source'} has none"
        raise ConfigError(f"there are no images: {why}")
    return files


def resized_batch(images: Iterable[np.ndarray], height: int, width: int) -> np.ndarray:
    """(N, 3, height, width) float32 of (H, W, 3) uint8 images of any size."""
    resized = [cv2.resize(x, (width, height), interpolation=cv2.INTER_AREA) for x in images]
    return np.ascontiguousarray(np.stack(resized).transpose(0, 3, 1, 2), dtype=np.float32)


def readable_images(files: Iterable[str], image_format: str) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8 images of files, one at a time; those that cannot be read are left out."""
    for file in files:
        try:
            yield read_image(file, image_format)
        except BadImageError:
            continue
