"""The sparse scenes with 80 classes, of which only the ten digits occur.

``digits_sparse_80_{train,dev,val}`` have the images and objects of ``digits_sparse_*``. Each anchor
has eight times as many outputs, so for the same positives there are eight times as many negatives,
as on COCO with its 80 classes. All of the additional ones are easy. Importing this module registers
the datasets, so a config names it in ``IMPORTS``.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from retina_plugin.cache import atomic_write
from retina_plugin.data import digits

__all__ = ["CLASSES", "register"]

CLASSES = [*digits.CLASSES, *(f"absent {i}" for i in range(70))]


def register() -> None:
    """Register the splits train, dev and val. Their files are written when they are first read."""
    for split in ("train", "dev", "val"):
        name = f"digits_sparse_80_{split}"
        if name not in DatasetCatalog:
            DatasetCatalog.register(name, functools.partial(_load, name, split))
            MetadataCatalog.get(name).set(
                json_file=str(_json_file(split)),
                image_root=str(digits.dataset_root(digits.SPARSE_SPEC) / split),
                thing_classes=CLASSES,
                evaluator_type="coco",
                prepare=functools.partial(_prepare, split),
            )


def _json_file(split: str) -> Path:
    root = digits.dataset_root(digits.SPARSE_SPEC)
    return root.with_name(f"{root.name}-80") / f"{split}.json"


def _prepare(split: str) -> None:
    annotations = json.loads((digits.prepare(digits.SPARSE_SPEC) / f"{split}.json").read_text())
    annotations["categories"] = [{"id": i, "name": x} for i, x in enumerate(CLASSES, start=1)]
    text = json.dumps(annotations)
    path = _json_file(split)
    if not path.is_file() or path.read_text() != text:
        with atomic_write(path) as partial:
            partial.write_text(text)


def _load(name: str, split: str) -> list[dict[str, Any]]:
    _prepare(split)
    return load_coco_json(str(_json_file(split)), MetadataCatalog.get(name).image_root, name)


register()
