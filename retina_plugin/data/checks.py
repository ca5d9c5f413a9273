"""Checks of the datasets that a config names, before anything expensive starts."""

from __future__ import annotations

import difflib
import os
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from retina_plugin.errors import ConfigError

__all__ = ["check_datasets", "check_num_classes"]

_COCO_LAYOUT = (
    "coco/annotations/instances_{train,val}2017.json and coco/{train,val}2017/ "
    "(for test-dev also coco/annotations/image_info_test-dev2017.json and coco/test2017/)"
)


def check_datasets(cfg: Any, splits: tuple[str, ...] = ("TRAIN", "TEST")) -> None:
    """Every dataset of ``DATASETS.TRAIN`` and ``DATASETS.TEST`` is registered and has its files.

    The embedded dataset is written here if it is not there yet.

    Raises:
        ConfigError: the first dataset that is not there, and where it belongs.
    """
    for split in splits:
        names = cfg.DATASETS[split]
        if split == "TRAIN" and not names:
            raise ConfigError(
                "DATASETS.TRAIN is empty: name a registered dataset, e.g. "
                '("coco_2017_train",) or ("digits_scenes_train",)'
            )
        for name in names:
            _check_dataset(f"DATASETS.{split}", name)


def _check_dataset(key: str, name: str) -> None:
    if name not in DatasetCatalog:
        near = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ConfigError(
            f"{key}: no dataset '{name}' is registered; {hint}Register yours with "
            "detectron2.data.datasets.register_coco_instances before training (see the README)"
        )
    metadata = MetadataCatalog.get(name)
    prepare = metadata.get("prepare")
    if prepare is not None:
        try:
            prepare()
        except ModuleNotFoundError as error:  # an extra is not installed: the message says which
            raise ConfigError(f"{key}: {name}: {error}") from None
    for attribute in ("json_file", "image_root"):
        path = metadata.get(attribute)
        if path is None or "://" in path or os.path.exists(path):
            continue
        if name.startswith("coco_"):
            root = os.path.abspath(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
            where = (
                f"put COCO under {root} as {_COCO_LAYOUT}, or set the environment variable "
                "DETECTRON2_DATASETS to the folder that holds coco/"
            )
        else:
            where = f"check the {attribute} with which the dataset was registered"
        raise ConfigError(f"{key}: {name} has no {attribute} at {path}: {where}")


def check_num_classes(cfg: Any) -> None:
    """``MODEL.RETINANET.NUM_CLASSES`` is the number of classes of every dataset that knows it.

    Raises:
        ConfigError: the dataset, both numbers and the key.
    """
    expected = cfg.MODEL.RETINANET.NUM_CLASSES
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes is not None and len(classes) != expected:
            raise ConfigError(
                f"MODEL.RETINANET.NUM_CLASSES is {expected}, but {name} has {len(classes)} "
                f"classes: set MODEL.RETINANET.NUM_CLASSES {len(classes)} "
                "(MODEL.ROI_HEADS.NUM_CLASSES has no effect on RetinaNet)"
            )
