"""What the decisions are made from: the boxes, classes and images of the training set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog

from retina_plugin.doctor import dataset_records
from retina_plugin.doctor.ground_truth import GroundTruth
from retina_plugin.errors import ConfigError

__all__ = ["Facts"]


@dataclass(frozen=True)
class Facts:
    """A training set, and the number of images to evaluate on.

    Args:
        train: its name in ``DATASETS.TRAIN``.
        class_names: of the K classes, in the order of their numbers.
        gt: its boxes.
        images: images that have a box; training leaves out the others.
        empty: images without a box.
        val: the name in ``DATASETS.TEST``; None without one.
        val_images: its images.
    """

    train: str
    class_names: tuple[str, ...]
    gt: GroundTruth
    images: int
    empty: int
    val: str | None = None
    val_images: int = 0

    @classmethod
    def read(cls, train: str, val: str | None = None) -> Facts:
        """Load the records of registered datasets.

        Raises:
            ConfigError: a dataset is not registered or cannot be read, has no box, or no names of
                its classes.
        """
        gt = GroundTruth.from_records(_records(train))
        if not len(gt.boxes_G4):
            raise ConfigError(
                f"{train} has no box that training would see in {len(gt.files):,} images: there is "
                "nothing to learn"
            )
        names = MetadataCatalog.get(train).get("thing_classes")
        if names is None:
            raise ConfigError(f"{train} has no names of its classes: set its thing_classes")
        images = len(np.unique(gt.image_G))
        return cls(
            train,
            tuple(map(str, names)),
            gt,
            images,
            len(gt.files) - images,
            val,
            0 if val is None else len(_records(val)),
        )

    @property
    def sides_G(self) -> np.ndarray:
        """(G,) square roots of the boxes' areas, in shorter sides of their images."""
        sides_G2 = self.gt.boxes_G4[:, 2:] - self.gt.boxes_G4[:, :2]
        return np.sqrt(sides_G2.prod(axis=1)) / self.gt.shapes_I2.min(axis=1)[self.gt.image_G]

    @property
    def short_side(self) -> int:
        """Median of the images' shorter sides (pixels)."""
        return round(float(np.median(self.gt.shapes_I2.min(axis=1))))

    @property
    def aspect(self) -> float:
        """Longer over shorter side, which at most one image in twenty exceeds."""
        shapes_I2 = self.gt.shapes_I2
        return float(np.quantile(shapes_I2.max(axis=1) / shapes_I2.min(axis=1), 0.95))

    @property
    def crowded(self) -> int:
        """Boxes of an image, which at most one image in a hundred exceeds."""
        counts_I = np.bincount(self.gt.image_G, minlength=len(self.gt.files))
        return int(np.ceil(np.quantile(counts_I[counts_I > 0], 0.99)))


def _records(name: str) -> list[Any]:
    records = dataset_records(name)
    if not isinstance(records, list):
        raise ConfigError(f"{name} is no list of records")
    return records
