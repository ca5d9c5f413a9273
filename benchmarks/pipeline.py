"""The benchmark's contests of what surrounds the network: reading images and evaluation."""

from __future__ import annotations

import contextlib
import importlib
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import DatasetMapper as Detectron2DatasetMapper
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator as Detectron2COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances

from benchmarks.cases import Contest
from benchmarks.models import Batch, model_cfg
from retina_plugin.data import FastMapper
from retina_plugin.evaluation import FastCOCOEvaluator

__all__ = ["detectron2_is_compiled", "evaluate", "mapper"]


# --- data ------------------------------------------------------------------------------------


def mapper(device: str) -> Iterator[Contest]:
    """A training image from a JPEG of 640 x 480 pixels to 800 pixels on its short side."""
    from sklearn.datasets import load_sample_images  # of the extra "demo": real photos

    cfg = model_cfg("R50_800", device)
    cfg.INPUT.MIN_SIZE_TRAIN = (800,)
    folder = tempfile.TemporaryDirectory()
    records = []
    for number, photo in enumerate(load_sample_images().images):
        path = Path(folder.name) / f"{number}.jpg"
        cv2.imwrite(str(path), cv2.resize(photo[..., ::-1], (640, 480)))
        boxes = np.random.default_rng(number).uniform(0, 200, (10, 4))
        annotations = [
            {"bbox": list(box), "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1, "iscrowd": 0}
            for box in boxes
        ]
        size = {"width": 640, "height": 480}
        records.append({"file_name": str(path), "annotations": annotations, **size})

    def reader(mapper_class: Any) -> Callable[[], Any]:
        mapper = mapper_class(**mapper_class.from_config(cfg, is_train=True))

        def run() -> list[dict[str, Any]]:
            assert folder.name  # the files live as long as this function
            np.random.seed(0)
            random.seed(0)
            return [mapper(record) for record in records * 4]

        return run

    def check(results: dict[str, Any]) -> str:
        worst, differ = 0, 0.0
        for got, expected in zip(results["ours"], results["detectron2"]):
            assert torch.equal(
                got["instances"].gt_boxes.tensor, expected["instances"].gt_boxes.tensor
            )
            difference = (got["image"].int() - expected["image"].int()).abs()
            worst = max(worst, int(difference.max()))
            differ = max(differ, (difference > 0).float().mean().item())
        assert worst <= 2 and differ < 1e-3, (worst, differ)
        return f"boxes equal to the bit; {100 * differ:.3f} % of the values differ, by {worst}"

    contenders = {"detectron2": reader(Detectron2DatasetMapper), "ours": reader(FastMapper)}
    name = f"{4 * len(records)} images, 640 x 480 to 800 px"
    yield Contest("mapper", name, contenders, check, memory=False)


# --- evaluation ------------------------------------------------------------------------------


def evaluate(device: str, num_images: int = 5000, num_classes: int = 80) -> Iterator[Contest]:
    """COCO's metrics of 100 detections an image, as val2017 has them."""
    rng = np.random.default_rng(0)
    name = f"benchmark_evaluate_{num_images}"
    folder = tempfile.TemporaryDirectory()
    inputs, outputs = synthetic_coco(rng, num_images, num_classes, Path(folder.name), name)

    def evaluator(make: Callable[[], Any]) -> Callable[[], Any]:
        made = make()

        def run() -> dict[str, float]:
            made.reset()
            with contextlib.redirect_stdout(None):  # pycocotools prints its table
                for one_input, one_output in zip(inputs, outputs):
                    made.process([one_input], [one_output])
                return made.evaluate()["bbox"]

        return run

    def check(results: dict[str, Any]) -> str:
        expected = results["detectron2"]
        assert results["ours"].keys() == expected.keys()
        for metric, value in expected.items():
            np.testing.assert_array_equal(results["ours"][metric], value, metric)
        return f"{len(expected)} numbers equal, AP of each class among them"

    output = Path(folder.name)
    contenders = {
        "detectron2": evaluator(
            lambda: Detectron2COCOEvaluator(name, ("bbox",), output_dir=str(output / "theirs"))
        ),
        "ours": evaluator(lambda: FastCOCOEvaluator(name, output_dir=str(output / "ours"))),
    }
    peer = "Detectron2's C++" if detectron2_is_compiled() else "pycocotools"
    title = f"{100 * num_images:,} detections, {num_classes} classes, against {peer}"
    yield Contest("evaluate", title, contenders, check, rounds=1, memory=False)
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)
    folder.cleanup()


def detectron2_is_compiled() -> bool:
    """Whether Detectron2 has its C++ parts here; without them its evaluator is pycocotools'."""
    try:
        importlib.import_module("detectron2._C")
    except ImportError:
        return False
    return True


def synthetic_coco(
    rng: np.random.Generator, num_images: int, num_classes: int, folder: Path, name: str
) -> tuple[Batch, Batch]:
    """Register ground truth like COCO's (seven boxes an image) and give an evaluator's input."""
    images: Batch = []
    annotations: Batch = []
    inputs: Batch = []
    outputs: Batch = []
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
        # detections near the objects, of their class more often than not, and noise
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
        DatasetCatalog.get(name)  # names of the classes
    return inputs, outputs
