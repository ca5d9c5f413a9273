"""The training mapper: from a JPEG to the network's input."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import DatasetMapper as Detectron2DatasetMapper
from detectron2.structures import BoxMode

from benchmarks.case import Case
from benchmarks.inputs import Records, model_cfg
from retina_plugin.data import FastMapper

__all__ = ["mapper"]


def mapper(device: str) -> Iterator[Case]:
    """Photos of 640 x 480 pixels, resized to 800 pixels on the short side."""
    cfg = model_cfg("R50_800", device)
    cfg.INPUT.MIN_SIZE_TRAIN = (800,)
    with tempfile.TemporaryDirectory() as folder:
        records = _photo_records(Path(folder)) * 4

        def mapping_by(mapper: Callable[[dict[str, Any]], Any]) -> Callable[[], Any]:
            def run() -> Records:
                np.random.seed(0)
                random.seed(0)
                return [mapper(record) for record in records]

            return run

        implementations = {
            "detectron2": mapping_by(Detectron2DatasetMapper(cfg, is_train=True)),
            "ours": mapping_by(FastMapper(**FastMapper.from_config(cfg, is_train=True))),
        }
        name = f"{len(records)} images, 640 x 480 to 800 px"
        yield Case("mapper", name, implementations, _same_records, memory=False)


def _photo_records(folder: Path) -> Records:
    """Write two real photos as JPEGs; ten random boxes in each."""
    from sklearn.datasets import load_sample_images  # scikit-learn is of the extra "demo"

    records = []
    for number, photo in enumerate(load_sample_images().images):
        path = folder / f"{number}.jpg"
        cv2.imwrite(str(path), cv2.resize(photo[..., ::-1], (640, 480)))
        boxes = np.random.default_rng(number).uniform(0, 200, (10, 4))
        annotations = [
            {"bbox": list(box), "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1, "iscrowd": 0}
            for box in boxes
        ]
        size = {"width": 640, "height": 480}
        records.append({"file_name": str(path), "annotations": annotations, **size})
    return records


def _same_records(results: dict[str, Any]) -> str:
    """Boxes equal to the bit; pixels by at most 2 levels apart, in less than 0.1 % of values."""
    largest, share = 0, 0.0
    for ours, expected in zip(results["ours"], results["detectron2"]):
        assert torch.equal(ours["instances"].gt_boxes.tensor, expected["instances"].gt_boxes.tensor)
        difference = (ours["image"].int() - expected["image"].int()).abs()
        largest = max(largest, int(difference.max()))
        share = max(share, (difference > 0).float().mean().item())
    assert largest <= 2 and share < 1e-3, (largest, share)
    return f"boxes equal to the bit; {100 * share:.3f} % of the values differ, by {largest}"
