"""What the benchmark compares beside single kernels: data, evaluation, whole steps, inference."""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import DatasetMapper as Detectron2DatasetMapper
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator as Detectron2COCOEvaluator
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from retina_plugin.data import FastMapper
from retina_plugin.engine import setup_cfg
from retina_plugin.engine.speed import check_compiler, prepare_model
from retina_plugin.errors import ConfigError
from retina_plugin.evaluation import FastCOCOEvaluator

from .contests import Contest
from .paper import checkout, load_paper

__all__ = ["evaluate", "inference", "mapper", "train_step"]

Batch = list[dict[str, Any]]


def model_cfg(name: str, device: str) -> CfgNode:
    """A row of Table 1e with Detectron2's protocol, so that both models compute the same."""
    root = checkout()
    cfg = setup_cfg(str(root / "configs" / f"retina_{name}.yaml"))
    protocol = root / "configs" / "_base_" / "protocol_detectron2.yaml"
    cfg.merge_from_other_cfg(CfgNode(CfgNode.load_yaml_with_base(str(protocol))))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.VIS_PERIOD = device, "", 0
    return cfg


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
    title = f"{num_images:,} images, {100 * num_images:,} detections, {num_classes} classes"
    yield Contest("evaluate", title, contenders, check, rounds=1, memory=False)
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)
    folder.cleanup()


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


# --- whole models ----------------------------------------------------------------------------


def batch_of(num_images: int, height: int, width: int, device: str) -> Batch:
    torch.manual_seed(0)
    batch = []
    for _ in range(num_images):
        corner = torch.rand(8, 2) * torch.tensor([width, height]) * 0.6
        size = 16 + torch.rand(8, 2) * torch.tensor([width, height]) * 0.35
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + size], dim=1))
        instances.gt_classes = torch.randint(80, (8,))
        image = torch.randint(256, (3, height, width), dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


def models(
    name: str, device: str, options: dict[str, dict[str, Any]], train: bool
) -> dict[str, nn.Module]:
    """Detectron2's RetinaNet and ours, with the same random weights, by contender."""
    cfg = model_cfg(name, device)
    built: dict[str, nn.Module] = {}
    state = None
    for contender, option in options.items():
        cfg.MODEL.META_ARCHITECTURE = (
            "RetinaNet" if contender.startswith("detectron2") else "FocalRetinaNet"
        )
        model = build_model(cfg).train(train)
        if state is None:
            torch.manual_seed(0)
            with torch.no_grad():  # scores as spread as a trained network's, so that some pass
                model.head.cls_score.weight.normal_(std=0.05)
            state = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(state)
        prepare_model(model, **option)
        built[contender] = model
    return built


def contenders(device: str) -> dict[str, dict[str, Any]]:
    """Options of ``prepare_model`` by contender; those with "16 bit" run under autocast."""
    last = {"channels_last": True}
    options: dict[str, dict[str, Any]] = {
        "detectron2": {},
        "detectron2, 16 bit": {},
        "detectron2, 16 bit channels_last": last,
        "ours": {},
        "ours, 16 bit channels_last": last,
    }
    with contextlib.suppress(ConfigError):  # without a compiler there is one contender less
        check_compiler(device)
        options["ours, 16 bit channels_last compile"] = {**last, "compile_parts": True}
    return options


def autocast(contender: str, device: str) -> Any:
    return torch.autocast(device, torch.bfloat16, enabled="16 bit" in contender)


def train_step(device: str) -> Iterator[Contest]:
    """Forward and backward of a batch; no optimizer, which is the same for all."""
    sizes = [("R50", 2, 400, 600)]
    if device == "cuda":
        sizes = [("R50", 16, 800, 1333), ("R101", 16, 800, 1333)]
    for depth, num_images, height, width in sizes:
        batch = batch_of(num_images, height, width, device)
        options = contenders(device)
        built = models(f"{depth}_800", device, options, train=True)

        def step(contender: str, model: nn.Module, batch: Batch = batch) -> Callable[[], Any]:
            def run() -> dict[str, torch.Tensor]:
                model.zero_grad(set_to_none=True)
                with EventStorage(), autocast(contender, device):
                    losses = model(batch)
                sum(losses.values()).backward()
                return {k: v.detach() for k, v in losses.items()}

            return run

        def check(results: dict[str, Any]) -> str:
            for name, value in results["detectron2"].items():
                torch.testing.assert_close(results["ours"][name], value, rtol=1e-4, atol=0)
                for contender, losses in results.items():
                    if contender.startswith("ours"):
                        torch.testing.assert_close(losses[name].float(), value, rtol=3e-2, atol=0)
            return "losses within 1e-4 of Detectron2's in 32 bit, 3e-2 in 16"

        steps = {name: step(name, model) for name, model in built.items()}
        title = f"{depth}, batch {num_images}, {height} x {width}"
        yield Contest("train-step", title, steps, check, rounds=5)


def inference(device: str) -> Iterator[Contest]:
    """Image to detections."""
    batch = batch_of(1, 400, 600, device)
    options = contenders(device)
    built = models("R50_400", device, options, train=False)

    def detect(contender: str, model: nn.Module) -> Callable[[], Any]:
        def run() -> Instances:
            with torch.no_grad(), autocast(contender, device):
                return model(batch)[0]["instances"]

        return run

    def check(results: dict[str, Any]) -> str:
        expected, got = results["detectron2"], results["ours"]
        assert len(got) == len(expected) > 0
        torch.testing.assert_close(got.scores, expected.scores, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            got.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-4, atol=1e-2
        )
        assert torch.equal(got.pred_classes, expected.pred_classes)
        return f"{len(got)} detections, the same as Detectron2's in 32 bit"

    runs = {name: detect(name, model) for name, model in built.items()}
    yield Contest("inference", "R50, 1 image, 400 x 600", runs, check)
    del built, runs
    yield from table1e(device)


def table1e(device: str) -> Iterator[Contest]:
    """The time of an image by depth and scale, as in Table 1e and Figure 2."""
    for row in load_paper()["1e"].rows:
        depth, scale = row.name.split("-")
        height, width = int(scale), round(int(scale) * 4 / 3)  # most of COCO is 640 x 480
        batch = batch_of(1, height, width, device)
        model = models(f"{depth}_{scale}", device, {"ours": {}}, train=False)["ours"]

        def run(model: nn.Module = model, batch: Batch = batch) -> Any:
            with torch.no_grad():
                return model(batch)

        yield Contest("inference", row.name, {"ours": run}, lambda results: "", rounds=3)
