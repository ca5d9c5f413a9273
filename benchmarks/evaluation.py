"""Evaluation: COCO's metrics of as many detections as val2017 has."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator as Detectron2COCOEvaluator
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, Instances

from benchmarks.case import Case
from benchmarks.inputs import Records
from benchmarks.machine import detectron2_is_compiled
from retina_plugin.evaluation import FastCOCOEvaluator

__all__ = ["evaluate"]


def evaluate(device: str, num_images: int = 5000, num_classes: int = 80) -> Iterator[Case]:
    """100 detections an image, from processing them to AP."""
    rng = np.random.default_rng(0)
    dataset_name = f"benchmark_evaluate_{num_images}"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        inputs, outputs = _synthetic_coco(rng, num_images, num_classes, root, dataset_name)
        evaluators: dict[str, DatasetEvaluator] = {
            "detectron2": Detectron2COCOEvaluator(
                dataset_name, ("bbox",), output_dir=str(root / "detectron2")
            ),
            "ours": FastCOCOEvaluator(dataset_name, output_dir=str(root / "ours")),
        }
        runs = {name: _evaluation(x, inputs, outputs) for name, x in evaluators.items()}
        peer = "Detectron2's C++" if detectron2_is_compiled() else "pycocotools"
        name = f"{100 * num_images:,} detections, {num_classes} classes, against {peer}"
        yield Case("evaluate", name, runs, _same_metrics, max_rounds=1, memory=False)
    DatasetCatalog.remove(dataset_name)
    MetadataCatalog.remove(dataset_name)


def _evaluation(
    evaluator: DatasetEvaluator, inputs: Records, outputs: Records
) -> Callable[[], dict[str, float]]:
    def run() -> dict[str, float]:
        evaluator.reset()
        with contextlib.redirect_stdout(None):  # pycocotools prints its table
            for one_input, one_output in zip(inputs, outputs):
                evaluator.process([one_input], [one_output])
            return evaluator.evaluate()["bbox"]

    return run


def _same_metrics(results: dict[str, Any]) -> str:
    """Every number equal to the bit, NaN where NaN is."""
    expected = results["detectron2"]
    assert results["ours"].keys() == expected.keys()
    for metric, value in expected.items():
        np.testing.assert_array_equal(results["ours"][metric], value, metric)
    return f"{len(expected)} numbers equal, AP of each class among them"


def _synthetic_coco(
    rng: np.random.Generator, num_images: int, num_classes: int, folder: Path, name: str
) -> tuple[Records, Records]:
    """Register ground truth like COCO's (seven boxes an image).

    Returns:
        What an evaluator takes: the images and the detections in them.
    """
    images: Records = []
    annotations: Records = []
    inputs: Records = []
    outputs: Records = []
    for image in range(1, num_images + 1):
        images.append({"id": image, "file_name": f"{image}.jpg", "width": 640, "height": 480})
        count = rng.poisson(7.3)
        boxes = rng.uniform(0, 1, (count, 4)) * [400, 300, 200, 150] + [0, 0, 8, 8]
        classes = rng.integers(num_classes, size=count)
        for box, k in zip(boxes.tolist(), classes.tolist()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": k + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(rng.random() < 0.01),
                }
            )
        # 100 detections near the objects; six of ten have the object's class, the rest any class
        near = rng.integers(count, size=100) if count else np.zeros(0, int)
        found = boxes[near] + rng.normal(0, 12, (len(near), 4))
        found[:, 2:] = found[:, :2] + found[:, 2:].clip(4)
        right = rng.random(len(near)) < 0.6
        detected = np.where(right, classes[near], rng.integers(num_classes, size=len(near)))
        instances = Instances((480, 640))
        instances.pred_boxes = Boxes(torch.from_numpy(found).float())
        instances.scores = torch.from_numpy(rng.random(len(near))).float()
        instances.pred_classes = torch.from_numpy(detected)
        inputs.append({"image_id": image, "file_name": f"{image}.jpg"})
        outputs.append({"instances": instances})
    categories = [{"id": k + 1, "name": f"class {k}"} for k in range(num_classes)]
    path = folder / "instances.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    register_coco_instances(name, {}, str(path), str(folder))
    with contextlib.redirect_stdout(None):
        DatasetCatalog.get(name)  # loading it fills the metadata: names and ids of the classes
    return inputs, outputs
